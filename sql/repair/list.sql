-- Repositories in a state, or in any; those that changed last come first.
SELECT r.did, r.state, r.reason, r.attempts, r.host, r.records, r.healed, r.deleted, r.refused, r.message,
       extract(epoch FROM r.retry_at)::bigint, extract(epoch FROM r.updated_at)::bigint
FROM standpipe.repos r WHERE $1 = '' OR r.state = $1 ORDER BY r.updated_at DESC LIMIT $2
