"""The Mosaic GPU kernels: forward, backward, and the sum of dweight; and what they are made of."""
