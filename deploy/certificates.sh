#!/usr/bin/env bash
# Makes a certificate authority and the broker's certificate: deploy/certificates.sh FOLDER HOST [HOST...]
#
# FOLDER gets ca.crt (for every gateway and the cloud), ca.key (keep it elsewhere), server.crt and server.key (for
# the broker). HOSTs are the names and IPv4 addresses that clients use. Run again to renew the server's: an authority
# that is there is kept.
set -euo pipefail

if (($# < 2)); then
  echo "usage: $0 FOLDER HOST [HOST...]" >&2
  exit 2
fi
folder="$1"
shift
umask 077
mkdir -p "$folder"

if [[ ! -e $folder/ca.key ]]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 3650 -subj "/CN=Tailrace CA" \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout "$folder/ca.key" -out "$folder/ca.crt" 2>/dev/null
fi

names=()
for host in "$@"; do
  if [[ $host =~ ^[0-9.]+$ ]]; then names+=("IP:$host"); else names+=("DNS:$host"); fi
done
printf -v names '%s,' "${names[@]}"
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -subj "/CN=$1" \
  -keyout "$folder/server.key" -out "$folder/server.csr" 2>/dev/null
openssl x509 -req -in "$folder/server.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" -CAcreateserial -days 397 \
  -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n' "${names%,}") \
  -out "$folder/server.crt" 2>/dev/null
rm -f "$folder/server.csr" "$folder/ca.srl"
chmod 0644 "$folder"/*.crt
echo "made $folder/server.crt for ${names%,}"
