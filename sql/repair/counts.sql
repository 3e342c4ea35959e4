SELECT r.state, count(*) FROM standpipe.repos r GROUP BY r.state ORDER BY r.state
