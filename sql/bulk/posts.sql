-- New posts without gates.
INSERT INTO posts (uri, cid, author_did, text, langs, tags, parent_uri, parent_cid, root_uri, root_cid, embed, facets,
                   created_at, commit_rev, commit_seq, stream_ms, stream_seq)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::jsonb[], $6::jsonb[], $7::text[], $8::text[],
    $9::text[], $10::text[], $11::jsonb[], $12::jsonb[], $13::timestamp[], $14::text[], $15::text[], $16::bigint[], $17::bigint[])
