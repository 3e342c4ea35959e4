-- How many accounts are tracked.
SELECT count(*) FROM standpipe.repos
