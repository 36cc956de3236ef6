"""Trained networks reduced in one sitting, block by block, by the evidence of their Kronecker curvature."""
