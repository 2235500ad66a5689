-- Who made a room may delete it; empty: nobody but operators. A deleted room stays as a name, so that links to it say so.
ALTER TABLE rooms ADD COLUMN maker TEXT NOT NULL DEFAULT '';
ALTER TABLE rooms ADD COLUMN deleted_at BIGINT;

-- Of an answer: who asked for it.
ALTER TABLE messages ADD COLUMN asker TEXT;
UPDATE messages SET asker = (SELECT question.user_id FROM messages AS question WHERE question.id = messages.reply_to)
    WHERE request_id IS NOT NULL;
CREATE INDEX messages_streaming ON messages (asker) WHERE state = 'streaming';

-- What a user has spent of the daily quotas, by the hour (since the epoch). It outlives the rooms it was spent in.
CREATE TABLE quota_spent (
    user_id TEXT NOT NULL,
    hour BIGINT NOT NULL,
    messages BIGINT NOT NULL,
    runs BIGINT NOT NULL,
    rooms BIGINT NOT NULL,
    PRIMARY KEY (user_id, hour)
);
CREATE INDEX quota_spent_by_hour ON quota_spent (hour);
