-- The posts among these ($1) whose flags disagree with the gates (sql/apply/31_gates.sql). A gate written by the old
-- workers does not hold its record's rules, so the flags that they set stay.
SELECT k.key,
       row(p.has_thread_gate, p.has_post_gate, p.violates_thread_gate, p.violates_embedding_rules)::text,
       row(e.thread_gate, e.post_gate, e.breaks_thread, e.breaks_post)::text
FROM unnest($1::text[]) AS k (key)
JOIN posts p ON p.uri = k.key
CROSS JOIN LATERAL (SELECT
    EXISTS (SELECT FROM thread_gates g WHERE g.post_uri = p.uri) AS thread_gate,
    EXISTS (SELECT FROM post_gates g WHERE g.post_uri = p.uri) AS post_gate,
    coalesce((
        SELECT CASE WHEN g.stream_ms IS NULL THEN p.violates_thread_gate ELSE standpipe.breaks_thread_gate(
            g.allow, g.hidden_replies, p.root_uri, (SELECT r.facets FROM posts r WHERE r.uri = p.root_uri),
            p.author_did, p.uri) END
        FROM thread_gates g WHERE g.post_uri = p.root_uri), false) AS breaks_thread,
    coalesce((
        SELECT bool_or(CASE WHEN g.stream_ms IS NULL THEN p.violates_embedding_rules ELSE standpipe.breaks_post_gate(
            g.embedding_rules, q.quoted_uri, p.author_did, p.uri) END)
        FROM quotes q JOIN post_gates g ON g.post_uri = q.quoted_uri WHERE q.post_uri = p.uri), false) AS breaks_post
) e
WHERE (p.has_thread_gate, p.has_post_gate, p.violates_thread_gate, p.violates_embedding_rules)
   <> (e.thread_gate, e.post_gate, e.breaks_thread, e.breaks_post)
