"""The main job: fit, reduce, refit, measure, save; resumable at every epoch."""
