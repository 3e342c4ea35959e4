-- New reposts.
INSERT INTO reposts (uri, user_did, post_uri, subject_cid, via, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
SELECT unnest($1::text[]), unnest($2::text[]), unnest($3::text[]), unnest($4::text[]), unnest($5::jsonb[]),
    unnest($6::timestamp[]), unnest($7::text[]), unnest($8::text[]), unnest($9::bigint[]), unnest($10::bigint[])
