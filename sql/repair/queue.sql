-- Queues a repository, at the earliest when it may be compared again.
INSERT INTO standpipe.repos AS r (did, state, class, reason, wanted_rev) VALUES ($1, 'queued', $2, $3, $4)
ON CONFLICT (did) DO UPDATE SET
    state = 'queued', class = least(excluded.class, CASE r.state WHEN 'queued' THEN r.class END),
    reason = excluded.reason, wanted_rev = greatest(r.wanted_rev, excluded.wanted_rev),
    retry_at = CASE r.state WHEN 'queued' THEN r.retry_at ELSE greatest(now(), r.retry_at) END,
    requests = r.requests + 1,
    attempts = CASE r.state WHEN 'queued' THEN r.attempts ELSE 0 END
