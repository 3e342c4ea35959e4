-- New likes.
INSERT INTO likes (uri, user_did, post_uri, subject_cid, via, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::jsonb[], $6::timestamp[],
    $7::text[], $8::text[], $9::bigint[], $10::bigint[])
