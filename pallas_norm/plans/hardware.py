"""What of an H100 or H200 the plans are made for. Fixed, so that the grid, and with it the order in which dweight is
added up, is too."""

SMS = 132
WARPS = 4  # in a warpgroup, which is what Pallas calls a thread
SMEM_BYTES = 227 << 10  # of an SM, for all its programs

# By CTAs of a cluster, clusters that an H200 holds at a time where a CTA fills an SM; more run after the others.
RESIDENT_CLUSTERS = {1: SMS, 2: 66, 4: 30, 8: 15}
