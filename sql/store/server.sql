-- Identifies this database and its server; a restored copy has a different timeline.
SELECT (pg_control_system()).system_identifier::text || '/' || (pg_control_checkpoint()).timeline_id
    || '/' || (SELECT oid FROM pg_database WHERE datname = current_database())
WHERE has_function_privilege('pg_control_system()', 'EXECUTE')
  AND has_function_privilege('pg_control_checkpoint()', 'EXECUTE')
