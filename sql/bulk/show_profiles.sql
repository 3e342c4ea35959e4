-- Shows the profiles that are new ($1: DIDs, $2: what they hold), without the labels that they no longer have. $3: URIs of
-- those that they have. The keys are given once more, so that rows are found by them, whatever the planner believes of a
-- young table.
WITH u AS (
    UPDATE users u SET
        display_name = o.body ->> 'display_name', description = o.body ->> 'description',
        avatar_url = o.body ->> 'avatar_url', banner_url = o.body ->> 'banner_url',
        pinned_post = o.body -> 'pinned_post', profile_record = o.body -> 'record'
    FROM unnest($1::text[], $2::jsonb[]) AS o (did, body)
    WHERE u.did = o.did AND u.did = ANY ($1)
)
DELETE FROM labels l
WHERE l.subject = ANY (ARRAY(SELECT 'at://' || did || '/app.bsky.actor.profile/self' FROM unnest($1::text[]) did))
  AND l.uri = l.subject || '#label/' || l.val
  AND l.uri <> ALL ($3)
