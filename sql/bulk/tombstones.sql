-- A tombstone for each delete ($1: URIs; $2-$5: versions): see standpipe.put_tombstone.
INSERT INTO standpipe.tombstones AS t (uri, commit_rev, commit_seq, stream_ms, stream_seq)
SELECT unnest($1::text[]), unnest($2::text[]), unnest($3::text[]), unnest($4::bigint[]), unnest($5::bigint[])
ON CONFLICT (uri) DO UPDATE SET
    commit_rev = excluded.commit_rev, commit_seq = excluded.commit_seq,
    stream_ms = excluded.stream_ms, stream_seq = excluded.stream_seq
WHERE standpipe.newer(
    excluded.commit_rev, excluded.commit_seq, excluded.stream_ms, excluded.stream_seq,
    t.commit_rev, t.commit_seq, t.stream_ms, t.stream_seq)
