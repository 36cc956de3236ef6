"""Numbers first, pictures second: measures of predictions, corruption shift, and the report made from them."""
