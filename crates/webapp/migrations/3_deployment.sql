-- Which database this is, so that web apps on one bus notice when they use different ones.
CREATE TABLE deployment (
    one BIGINT PRIMARY KEY,
    id TEXT NOT NULL
);
