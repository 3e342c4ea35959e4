-- Records of every other collection, kept whole. subject: the record's $type; body: the record.

CREATE OR REPLACE FUNCTION standpipe.put_record(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF standpipe.is_dead(o) THEN
        RETURN false;
    END IF;
    INSERT INTO generic_records AS r (uri, cid, author_did, record_type, record, created_at, commit_rev, commit_seq, stream_ms, stream_seq)
    VALUES (o.uri, o.cid, o.repo, o.subject, o.body, o.created_at, o.rev, o.seq, o.ms, o.sq)
    ON CONFLICT (uri) DO UPDATE SET
        cid = excluded.cid, record_type = excluded.record_type, record = excluded.record, created_at = excluded.created_at,
        commit_rev = excluded.commit_rev, commit_seq = excluded.commit_seq,
        stream_ms = excluded.stream_ms, stream_seq = excluded.stream_seq
    WHERE standpipe.newer(excluded.commit_rev, excluded.commit_seq, excluded.stream_ms, excluded.stream_seq,
                          r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    RETURN FOUND;
END $$;

CREATE OR REPLACE FUNCTION standpipe.delete_record(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM standpipe.put_tombstone(o);
    DELETE FROM generic_records r WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    RETURN FOUND;
END $$;
