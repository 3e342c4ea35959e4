-- New posts without gates.
INSERT INTO posts (uri, cid, author_did, text, langs, tags, parent_uri, parent_cid, root_uri, root_cid, embed, facets,
                   created_at, commit_rev, commit_seq, stream_ms, stream_seq)
SELECT unnest($1::text[]), unnest($2::text[]), unnest($3::text[]), unnest($4::text[]), unnest($5::jsonb[]),
    unnest($6::jsonb[]), unnest($7::text[]), unnest($8::text[]), unnest($9::text[]), unnest($10::text[]),
    unnest($11::jsonb[]), unnest($12::jsonb[]), unnest($13::timestamp[]), unnest($14::text[]), unnest($15::text[]),
    unnest($16::bigint[]), unnest($17::bigint[])
