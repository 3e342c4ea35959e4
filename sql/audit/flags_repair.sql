-- Evaluates them again, as sql/audit/flags_check.sql does.
UPDATE posts p SET
    has_thread_gate = EXISTS (SELECT FROM thread_gates g WHERE g.post_uri = p.uri),
    has_post_gate = EXISTS (SELECT FROM post_gates g WHERE g.post_uri = p.uri),
    violates_thread_gate = coalesce((
        SELECT CASE WHEN g.stream_ms IS NULL THEN p.violates_thread_gate ELSE standpipe.breaks_thread_gate(
            g.allow, g.hidden_replies, p.root_uri, (SELECT r.facets FROM posts r WHERE r.uri = p.root_uri),
            p.author_did, p.uri) END
        FROM thread_gates g WHERE g.post_uri = p.root_uri), false),
    violates_embedding_rules = coalesce((
        SELECT bool_or(CASE WHEN g.stream_ms IS NULL THEN p.violates_embedding_rules ELSE standpipe.breaks_post_gate(
            g.embedding_rules, q.quoted_uri, p.author_did, p.uri) END)
        FROM quotes q JOIN post_gates g ON g.post_uri = q.quoted_uri WHERE q.post_uri = p.uri), false)
WHERE p.uri = ANY ($1::text[])
