-- Feed generators and labelers ($1) copy a counter, whose row is now locked: see standpipe.change_late.
SELECT standpipe.copy_like_counts($1)
