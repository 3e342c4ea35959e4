-- How many repositories are in each state.
SELECT r.state, count(*) FROM standpipe.repos r GROUP BY r.state ORDER BY r.state
