-- Records of every other collection, kept whole. subject: the record's $type; body: the record.
CREATE OR REPLACE FUNCTION standpipe.put_records(ops standpipe.op[], OUT applied integer) LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO generic_records AS r (uri, cid, author_did, record_type, record, created_at,
                                      commit_rev, commit_seq, stream_ms, stream_seq)
    SELECT o.uri, o.cid, o.repo, o.subject, o.body, o.created_at, o.rev, o.seq, o.ms, o.sq
    FROM unnest(ops) o
    WHERE NOT standpipe.is_dead(o)
    ON CONFLICT (uri) DO UPDATE SET
        cid = excluded.cid, record_type = excluded.record_type, record = excluded.record,
        created_at = excluded.created_at,
        commit_rev = excluded.commit_rev, commit_seq = excluded.commit_seq,
        stream_ms = excluded.stream_ms, stream_seq = excluded.stream_seq
    WHERE standpipe.newer(excluded.commit_rev, excluded.commit_seq, excluded.stream_ms, excluded.stream_seq,
                          r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    GET DIAGNOSTICS applied = ROW_COUNT;
END $$;

CREATE OR REPLACE FUNCTION standpipe.delete_records(ops standpipe.op[], OUT applied integer) LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM generic_records r USING unnest(ops) o
    WHERE r.uri = o.uri AND standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, r.commit_rev, r.commit_seq, r.stream_ms, r.stream_seq);
    GET DIAGNOSTICS applied = ROW_COUNT;
END $$;
