-- How many repositories are queued, for each class, and in each state otherwise.
SELECT count(*) FILTER (WHERE r.state = 'queued' AND r.class = 0),
       count(*) FILTER (WHERE r.state = 'queued' AND r.class = 1),
       count(*) FILTER (WHERE r.state = 'queued' AND r.class = 2),
       count(*) FILTER (WHERE r.state = 'synced'),
       count(*) FILTER (WHERE r.state = 'gone'),
       count(*) FILTER (WHERE r.state = 'error')
FROM standpipe.repos r
