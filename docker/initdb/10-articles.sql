-- A table to index. Replace it by your own, here and in cdcsync.toml.

CREATE TABLE articles (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    author text NOT NULL,
    title text NOT NULL,
    body text NOT NULL
);

INSERT INTO articles (author, title, body) VALUES
    ('ana', 'Resetting a password', 'Open the sign-in page, choose "I cannot sign in" and follow the mail that arrives.'),
    ('ben', 'Invoices', 'Every invoice is kept for ten years and can be downloaded as a PDF from the billing page.'),
    ('ana', 'Closing an account', 'An account is closed at once; what it held is deleted after thirty days.');
