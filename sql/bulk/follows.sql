-- New follows.
INSERT INTO follows (uri, follower_did, following_did, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
SELECT unnest($1::text[]), unnest($2::text[]), unnest($3::text[]), unnest($4::timestamp[]), unnest($5::text[]),
    unnest($6::text[]), unnest($7::bigint[]), unnest($8::bigint[])
