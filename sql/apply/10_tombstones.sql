-- Every delete leaves a tombstone, whether or not there was a row: a create that arrives late must find it.
CREATE OR REPLACE FUNCTION standpipe.put_tombstone(o standpipe.op) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO standpipe.tombstones AS t (uri, commit_rev, commit_seq, stream_ms, stream_seq)
    VALUES (o.uri, o.rev, o.seq, o.ms, o.sq)
    ON CONFLICT (uri) DO UPDATE SET
        commit_rev = excluded.commit_rev, commit_seq = excluded.commit_seq,
        stream_ms = excluded.stream_ms, stream_seq = excluded.stream_seq
    WHERE standpipe.newer(
        excluded.commit_rev, excluded.commit_seq, excluded.stream_ms, excluded.stream_seq,
        t.commit_rev, t.commit_seq, t.stream_ms, t.stream_seq);
END $$;

-- Whether the record or its account has a delete that is not older than this operation.
CREATE OR REPLACE FUNCTION standpipe.is_dead(o standpipe.op) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM standpipe.tombstones t
    WHERE t.uri = o.uri AND NOT standpipe.newer(
        o.rev, o.seq, o.ms, o.sq, t.commit_rev, t.commit_seq, t.stream_ms, t.stream_seq);
    IF FOUND THEN
        RETURN true;
    END IF;
    PERFORM FROM standpipe.accounts a
    WHERE a.did = o.repo AND a.deleted_time IS NOT NULL
      AND standpipe.before_deletion(o.rev, o.seq, o.ms, a.deleted_seq, a.deleted_time);
    RETURN FOUND;
END $$;
