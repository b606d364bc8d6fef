#!/bin/sh
# Makes what compose.yaml keeps secret, once, in cluster/secrets. The folder keeps others on this machine out; the files in it are
# readable, for each container reads its own as a user of its own.
set -eu
cd "$(dirname "$0")"
[ -d secrets ] && { echo "cluster/secrets is there already; nothing is changed"; exit 0; }
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
umask 077
work=$(mktemp -d ./secrets.XXXXXX)
trap 'rm -rf "$work"' EXIT
postgres=$(random) key=$(random) secret=$(random)
printf %s "$postgres" >"$work/postgres_password"
printf %s "postgresql+asyncpg://scangraph:$postgres@postgres/scangraph" >"$work/scangraph_database_url"
printf '{"endpoint": "http://s3:8333", "allow_http": "true", "region": "us-east-1", "access_key_id": "%s", "secret_access_key": "%s"}' \
    "$key" "$secret" >"$work/scangraph_storage_options"
printf '{"identities": [{"name": "scangraph", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin", "Read", "Write", "List"]}]}' \
    "$key" "$secret" >"$work/s3.json"
random >"$work/grafana_password"
random >"$work/metrics-token"
chmod 644 "$work"/*
mv "$work" secrets
echo "made cluster/secrets; Grafana's password (user admin) is in cluster/secrets/grafana_password"
