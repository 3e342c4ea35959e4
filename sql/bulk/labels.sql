-- The labels that new posts and profiles have of their own: see standpipe.label_self.
INSERT INTO labels AS l (uri, src, subject, val, neg, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
SELECT u.uri, u.src, u.subject, u.val, false, u.created_at, u.rev, u.seq, u.ms, u.sq
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::timestamp[], $6::text[], $7::text[], $8::bigint[], $9::bigint[])
    AS u (uri, src, subject, val, created_at, rev, seq, ms, sq)
ON CONFLICT (uri) DO UPDATE SET
    src = excluded.src, subject = excluded.subject, val = excluded.val, neg = excluded.neg, created_at = excluded.created_at,
    commit_rev = excluded.commit_rev, commit_seq = excluded.commit_seq,
    stream_ms = excluded.stream_ms, stream_seq = excluded.stream_seq
