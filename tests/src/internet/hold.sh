# The Internet of the tests, as a process that holds namespaces of its own: every address is on their loopback, and nothing
# leads out. It says when its servers run, and stays until its input ends; they end with it.
# $1: the root directory with their programs; $2: the addresses; $3 and $4: what names.conf and web.conf hold; $5: where to
# put what the processes of sandboxes are started with.
set -e
root=$1
ip link set lo up
for address in $2; do
    case $address in
        *:*) ip address add "$address/128" dev lo nodad ;;
        *) ip address add "$address/32" dev lo ;;
    esac
done
# Servers have their usual ports without rights, and who is here may ping.
echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start
echo '0 0' > /proc/sys/net/ipv4/ping_group_range

for dir in dev proc; do mount --rbind "/$dir" "$root/$dir"; done
for dir in run srv tmp; do mount -t tmpfs -o mode=755 memory "$root/$dir"; done
inside() {
    exec unshare --user --map-user=1000 --map-group=1000 --root="$root" --wd=/srv -- setpriv --pdeathsig KILL "$@"
}
printf %s "$3" > "$root/srv/names.conf"
printf %s "$4" > "$root/srv/web.conf"
(inside sh -ec '
    mkdir -p www/cgi git
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key -out web.crt -days 30 \
        -subj /CN=web.test -addext subjectAltName=DNS:web.test,DNS:v4.test,DNS:v6.test > openssl.log 2>&1 || cat openssl.log >&2
    cat key web.crt > web.pem
    head --bytes 1500000 /dev/urandom > www/data
    for at in $(seq 20); do echo "page $at" > www/page$at; done
    printf "%s\n" "#!/bin/sh" "echo Content-Type: text/plain" "echo" "echo \$REMOTE_PORT \$SERVER_PROTOCOL" \
        "sha256sum" > www/cgi/hash
    chmod +x www/cgi/hash
')
# An answer that is longer than a datagram may be, and than a line of that file.
inside dnsmasq --conf-file=/srv/names.conf --txt-record="long.test,$(seq -s , 1000 1999)" &
inside lighttpd -D -f /srv/web.conf &

{
    echo '#!/bin/sh'
    echo "exec nsenter --target $$ --user --preserve-credentials --net -- \"\$CUBBY_RUNTIME\" \"\$@\""
} > "$5"
chmod +x "$5"
echo there
exec cat
