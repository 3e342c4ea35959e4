-- The tracked accounts after this one ($1): all that were ever queued.
SELECT r.did FROM standpipe.repos r WHERE r.did > $1 ORDER BY r.did LIMIT 5000
