-- Runs on SQLite and on PostgreSQL: only what both understand.

CREATE TABLE users (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    password TEXT NOT NULL,
    created_at BIGINT NOT NULL
);

-- A browser that is signed in; the token itself is known to the browser alone.
CREATE TABLE logins (
    token_hash TEXT PRIMARY KEY,
    user_id TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    expires_at BIGINT NOT NULL
);
CREATE INDEX logins_by_expiry ON logins (expires_at);

CREATE TABLE rooms (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    created_at BIGINT NOT NULL
);
INSERT INTO rooms (id, name, created_at) VALUES ('general', 'general', 1), ('random', 'random', 2);

-- The last message's id. Taking one locks the row until the commit, so ids become visible in their order.
CREATE TABLE message_ids (last BIGINT NOT NULL);
INSERT INTO message_ids (last) VALUES (0);

CREATE TABLE messages (
    id BIGINT PRIMARY KEY,
    room TEXT NOT NULL REFERENCES rooms (id),
    user_id TEXT NOT NULL,
    name TEXT NOT NULL,
    text TEXT NOT NULL,
    at BIGINT NOT NULL,
    -- The sender's own: a message sent again is the same message.
    nonce TEXT,
    -- done, streaming, failed or stopped; only an assistant's answer is ever something else than done.
    state TEXT NOT NULL,
    error TEXT,
    reply_to BIGINT,
    -- An answer's task and the request that asks for it, byte for byte: it may have to be asked again.
    request_id TEXT,
    request TEXT,
    asked_at BIGINT,
    UNIQUE (user_id, nonce),
    UNIQUE (request_id)
);
CREATE INDEX messages_by_room ON messages (room, id);

-- What a page's app session needs to go on after a restart.
CREATE TABLE app_sessions (
    id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL,
    snapshot TEXT NOT NULL,
    updated_at BIGINT NOT NULL
);
CREATE INDEX app_sessions_by_age ON app_sessions (updated_at);
