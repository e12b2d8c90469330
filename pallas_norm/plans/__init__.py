"""Which kernel covers a row of n elements, and with which numbers: tables, and a pure function of (n, dtypes) for each
pass.

Never of the row count: that is what makes a row's bits independent of its batch.
"""
