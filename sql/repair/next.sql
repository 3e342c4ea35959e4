-- Some repositories whose turn it is. Which process takes which is decided by an advisory lock, so that one that dies
-- leaves nothing behind.
SELECT r.did FROM standpipe.repos r WHERE r.state = 'queued' AND r.retry_at <= now()
ORDER BY r.class, r.retry_at LIMIT 64
