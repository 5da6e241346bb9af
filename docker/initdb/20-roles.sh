#!/bin/bash
# The worker's role, with the least that it needs on both sides of this one database.
set -euo pipefail

psql --no-psqlrc --username "${POSTGRES_USER:-postgres}" --dbname "$POSTGRES_DB" \
    -v source_role=cdcsync -v target_role=cdcsync -v tables=public.articles -f "${ROLES_SQL:-/roles.sql}"
# On standard input, where no list of processes shows it.
psql --no-psqlrc --username "${POSTGRES_USER:-postgres}" --dbname "$POSTGRES_DB" -v ON_ERROR_STOP=1 --quiet <<'SQL'
\getenv password CDCSYNC_PASSWORD
ALTER ROLE cdcsync PASSWORD :'password';
SQL
