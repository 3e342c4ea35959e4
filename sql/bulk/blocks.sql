-- New blocks.
INSERT INTO blocks (uri, blocker_did, blocked_did, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamp[], $5::text[], $6::text[], $7::bigint[], $8::bigint[])
