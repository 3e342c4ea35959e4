-- Profiles as registers of their accounts ($1: DIDs, each once, none deleted; $2-$5: versions). Returns those that are
-- newer than what was there: see standpipe.put_profile.
INSERT INTO standpipe.accounts AS a (did, profile_rev, profile_seq, profile_ms, profile_sq)
SELECT unnest($1::text[]), unnest($2::text[]), unnest($3::text[]), unnest($4::bigint[]), unnest($5::bigint[])
ON CONFLICT (did) DO UPDATE SET
    profile_rev = excluded.profile_rev, profile_seq = excluded.profile_seq,
    profile_ms = excluded.profile_ms, profile_sq = excluded.profile_sq
WHERE standpipe.newer(excluded.profile_rev, excluded.profile_seq, excluded.profile_ms, excluded.profile_sq,
                      a.profile_rev, a.profile_seq, a.profile_ms, a.profile_sq)
RETURNING a.did
