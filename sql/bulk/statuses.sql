-- Statuses as registers of their accounts ($1: DIDs, each once; $2: numbers; $3: times; $4, $5: entries), none of them
-- deleted. Returns those that are newer than what was there: see standpipe.put_account.
INSERT INTO standpipe.accounts AS a (did, status_seq, status_time, status_ms, status_sq)
SELECT unnest($1::text[]), unnest($2::text[]), unnest($3::timestamp[]), unnest($4::bigint[]), unnest($5::bigint[])
ON CONFLICT (did) DO UPDATE SET
    status_seq = excluded.status_seq, status_time = excluded.status_time,
    status_ms = excluded.status_ms, status_sq = excluded.status_sq
WHERE standpipe.newer_status(excluded.status_seq, excluded.status_time, excluded.status_ms, excluded.status_sq,
                             a.status_seq, a.status_time, a.status_ms, a.status_sq)
RETURNING a.did
