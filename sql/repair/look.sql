-- What is queued about a repository that was just taken; no row if somebody else has finished it.
SELECT r.reason, r.wanted_rev, r.attempts, r.doubted, r.requests, r.class, r.host FROM standpipe.repos r
WHERE r.did = $1 AND r.state = 'queued' AND r.retry_at <= now()
