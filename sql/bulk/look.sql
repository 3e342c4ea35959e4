-- What is there already. Each is looked up by its key, whatever the planner believes of a young table (OFFSET 0).
--
--   $1       accounts: those that opted out, were deleted, or had their whole repository compared
--   $2       URIs of records to be written: those with a tombstone
--   $3, $4   of follows and posts: those with a row (of likes and reposts: others.sql)
--   $5       URIs of posts: those with a gate
--
-- The last columns: of the accounts whose old tombstones are gone, up to which revision; and whether sequence numbers have
-- named epochs.
SELECT
    ARRAY(SELECT s.user_did::text FROM user_settings s WHERE s.user_did = ANY ($1) AND s.data_collection_forbidden
          UNION ALL
          SELECT x.did FROM unnest($1::text[]) k (did), LATERAL (
              SELECT a.did FROM standpipe.accounts a WHERE a.did = k.did
                AND (a.deleted_time IS NOT NULL OR a.complete_rev IS NOT NULL) OFFSET 0) x),
    ARRAY(SELECT x.uri FROM unnest($2::text[]) k (uri), LATERAL (
              SELECT t.uri FROM standpipe.tombstones t WHERE t.uri = k.uri OFFSET 0) x
          UNION ALL
          SELECT x.uri FROM unnest($3::text[]) k (uri), LATERAL (
              SELECT r.uri FROM follows r WHERE r.uri = k.uri OFFSET 0) x
          UNION ALL
          SELECT x.uri FROM unnest($4::text[]) k (uri), LATERAL (
              SELECT r.uri FROM posts r WHERE r.uri = k.uri OFFSET 0) x),
    ARRAY(SELECT x.post_uri FROM unnest($5::text[]) k (uri), LATERAL (
              SELECT g.post_uri FROM thread_gates g WHERE g.post_uri = k.uri OFFSET 0) x
          UNION ALL
          SELECT x.post_uri FROM unnest($5::text[]) k (uri), LATERAL (
              SELECT g.post_uri FROM post_gates g WHERE g.post_uri = k.uri OFFSET 0) x),
    ARRAY(SELECT x.did || ' ' || x.rev FROM unnest($1::text[]) k (did), LATERAL (
              SELECT s.did, s.rev FROM standpipe.swept s WHERE s.did = k.did OFFSET 0) x),
    EXISTS (SELECT FROM standpipe.epochs)
