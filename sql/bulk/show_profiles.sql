-- Shows the profiles that are new ($1: DIDs, $2: what they hold; they have no labels of their own).
WITH u AS (
    UPDATE users u SET
        display_name = o.body ->> 'display_name', description = o.body ->> 'description',
        avatar_url = o.body ->> 'avatar_url', banner_url = o.body ->> 'banner_url',
        pinned_post = o.body -> 'pinned_post', profile_record = o.body -> 'record'
    FROM unnest($1::text[], $2::jsonb[]) AS o (did, body)
    WHERE u.did = o.did
)
DELETE FROM labels l USING unnest($1::text[]) AS o (did)
WHERE l.subject = 'at://' || o.did || '/app.bsky.actor.profile/self'
  AND l.uri = 'at://' || o.did || '/app.bsky.actor.profile/self#label/' || l.val
