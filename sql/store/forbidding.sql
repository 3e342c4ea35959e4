-- The accounts that forbid to collect what they write.
SELECT s.user_did::text FROM user_settings s WHERE s.data_collection_forbidden
