-- The web app that has the session in memory; empty: none.
ALTER TABLE app_sessions ADD COLUMN owner TEXT NOT NULL DEFAULT '';
CREATE INDEX app_sessions_by_user ON app_sessions (user_id, updated_at);
