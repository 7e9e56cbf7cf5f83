package config

import (
	"errors"
	"strings"
	"testing"
)

// refused is options in, error out: the message, then a hint a line.
var refused = []struct{ name, options, want string }{
	{"nothing to masquerade", "", "no masquerade source range: none of pod-cidrs, masquerade-forwarded and enable-k8s is set\n--pod-cidrs"},
	{"malformed CIDR", "pod-cidrs=10.0.0/8", `pod-cidrs "10.0.0/8" (SOURCE pod-cidrs): not a CIDR` + "\nwrite ADDRESS/LENGTH"},
	{"the bad one of several", "pod-cidrs=10.0.0.0/8,10.0.0.0/33", `pod-cidrs "10.0.0.0/33" (SOURCE pod-cidrs): not a CIDR`},
	{"address", "pod-cidrs=10.0.0.1", `pod-cidrs "10.0.0.1" (SOURCE pod-cidrs): an address without prefix length` + "\nwrite 10.0.0.1/32"},
	{"host bits", "pod-cidrs=10.0.0.1/8", `bits set behind the prefix length` + "\nwrite 10.0.0.0/8 for the network, or 10.0.0.1/32"},
	{"host bits, native", "ipv6-native-routing-cidr=fd00::1/8 masquerade-forwarded=true", "\nwrite fd00::/8 for the network"},
	{"family", "ipv4-native-routing-cidr=fd00::/8 masquerade-forwarded=true", `ipv4-native-routing-cidr "fd00::/8" (SOURCE ipv4-native-routing-cidr): not an IPv4 CIDR`},
	{"family", "ipv6-native-routing-cidr=10.0.0.0/8 masquerade-forwarded=true", "not an IPv6 CIDR"},
	{"family of an alias", "ipv4-range=fd00::/64", `ipv4-range "fd00::/64" (SOURCE ipv4-range): not an IPv4 CIDR`},
	{"mapped", "pod-cidrs=::ffff:10.0.0.0/104", "an IPv4-mapped IPv6 prefix, which matches no packet\nwrite 10.0.0.0/8"},
	{"alias", "pod-cidrs=10.0.0.0/16 ipv4-range=10.1.0.0/16", `two names of one option with different values` + "\ngive only pod-cidrs"},
	{"alias", "remote-node-masquerade=external enable-remote-node-masquerade=true masquerade-forwarded=true",
		`remote-node-masquerade "external" (SOURCE remote-node-masquerade) and enable-remote-node-masquerade "true"`},
	{"overlap", "snat-port-range=1024-65535 masquerade-forwarded=true",
		`snat-port-range "1024-65535" (SOURCE snat-port-range) overlaps node-port-range "30000-32767" (default)` + "\nleave 30000-32767 out"},
	{"overlap at one port", "snat-port-range=32767-65535 masquerade-forwarded=true", "overlaps"},
	{"reversed", "snat-port-range=40000-33000 masquerade-forwarded=true", `snat-port-range "40000-33000" (SOURCE snat-port-range): the range is reversed`},
	{"port 0", "snat-port-range=0-1000 masquerade-forwarded=true", "port 0 cannot be used"},
	{"high port", "snat-port-range=40000-65536 masquerade-forwarded=true", "a port above 65535"},
	{"no port", "snat-port-range=high masquerade-forwarded=true", "not a port or range"},
	{"no range", "snat-port-range=, masquerade-forwarded=true", "no range"},
	{"bad second range", "snat-port-range=40000-41000,x masquerade-forwarded=true", `snat-port-range "x"`},
	{"reversed node ports", "node-port-range=32767,30000 masquerade-forwarded=true", "the range is reversed"},
	{"no port left", "snat-port-range=40000-40001 reserved-ports=40000,40001 masquerade-forwarded=true",
		`snat-port-range "40000-40001" (SOURCE snat-port-range): no port from 1024 on is left without reserved-ports "40000,40001"`},
	{"devices differ", "devices=eth0 egress-masquerade-interfaces=eth1 masquerade-forwarded=true",
		`devices "eth0" (SOURCE devices) and egress-masquerade-interfaces "eth1"`},
	{"taint with a value", "k8s-startup-taint=a/b=c enable-k8s=true", `k8s-startup-taint "a/b=c" (SOURCE k8s-startup-taint): not the key of a taint` + "\nwrite the key alone"},
	{"taint with an effect", "k8s-startup-taint=a:NoSchedule enable-k8s=true", "not the key of a taint"},
	{"device name", "devices=eth0/1 masquerade-forwarded=true", `devices "eth0/1" (SOURCE devices): not a device name`},
	{"long device name", "devices=abcdefghijklmnop masquerade-forwarded=true", "not a device name"},
	{"empty exclude", "devices=! masquerade-forwarded=true", "not a device name"},
	{"auto and more", "devices=auto,eth0 masquerade-forwarded=true", "auto stands alone"},
	{"boolean", "masquerade-forwarded=maybe", `masquerade-forwarded "maybe" (SOURCE masquerade-forwarded): neither true nor false` + "\nwrite true or false"},
	{"enum", "unknown-protocols=accept masquerade-forwarded=true", "not one of its values\nwrite one of masquerade, drop, pass"},
	{"enum", "log-level=trace masquerade-forwarded=true", "not one of its values"},
	{"duration", "nat-timeout-udp=soon masquerade-forwarded=true", "not a duration"},
	{"duration without unit", "nat-timeout-udp=30 masquerade-forwarded=true", "a duration without unit\nwrite the unit, for example 30s"},
	{"duration 0", "nat-timeout-udp=0s masquerade-forwarded=true", "not above zero"},
	{"negative duration", "drain-timeout=-1s masquerade-forwarded=true", "not above zero"},
	{"short timeout", "nat-timeout-tcp-established=999ms masquerade-forwarded=true",
		`nat-timeout-tcp-established "999ms" (SOURCE nat-timeout-tcp-established): out of bounds` + "\nwrite a duration from 1s to 720h (30 days), for example 2h4m"},
	{"long timeout", "nat-timeout-udp=721h masquerade-forwarded=true", `nat-timeout-udp "721h" (SOURCE nat-timeout-udp): out of bounds`},
	{"number", "max-ports-per-pod=many masquerade-forwarded=true", "not a whole number"},
	{"huge number", "bpf-nat-global-max=99999999999 masquerade-forwarded=true", "out of bounds"},
	{"beyond any number", "bpf-nat-global-max=99999999999999999999 masquerade-forwarded=true", "out of bounds"},
	{"negative number", "max-ports-per-pod=-1 masquerade-forwarded=true", "below zero"},
	{"too large a number", "max-new-flows-per-pod=2000000000 masquerade-forwarded=true", "above 1000000000"},
	{"privileged ports only", "snat-port-range=600-1023 masquerade-forwarded=true", "no port from 1024 on"},
	{"few flows", "bpf-nat-global-max=1023 masquerade-forwarded=true", "out of bounds\nwrite a number of flows from 1024 to 16777216"},
	{"many flows", "bpf-nat-global-max=16777217 masquerade-forwarded=true", "out of bounds"},
	{"node address", "node-addresses=node-1 masquerade-forwarded=true", `node-addresses "node-1" (SOURCE node-addresses): not an IP address`},
	{"node address", "node-addresses=::ffff:10.0.0.1 masquerade-forwarded=true", "IPv4-mapped"},
	{"metrics", "prometheus-serve-addr=9965 masquerade-forwarded=true", "not an address to listen on\nwrite HOST:PORT"},
	{"metrics port", "prometheus-serve-addr=:http masquerade-forwarded=true", "not an address to listen on"},
	{"metrics per pod", "metrics-per-pod=1001 masquerade-forwarded=true", "out of bounds\nwrite a number of addresses from 1 to 1000, or 0 for none"},
	{"negative metrics per pod", "metrics-per-pod=-1 masquerade-forwarded=true", "out of bounds"},
}

func TestRefused(t *testing.T) {
	for _, c := range refused {
		t.Run(c.name, func(t *testing.T) {
			content := make(map[string]string)
			for kv := range strings.FieldsSeq(c.options) {
				k, v, _ := strings.Cut(kv, "=")
				content[k] = v
			}
			_, err := Load(Sources{Flags: content})
			checkRefused(t, err, strings.ReplaceAll(c.want, "SOURCE ", "flag --"))
		})
	}
}

// checkRefused compares message and hints with want, as far as that goes.
func checkRefused(t *testing.T, err error, want string) {
	t.Helper()
	e, ok := errors.AsType[*Error](err)
	if !ok {
		t.Fatalf("error %v, want an *Error with %s", err, want)
	}
	if got := e.Error() + "\n" + strings.Join(e.Hints, "\n"); !strings.Contains(got, want) {
		t.Errorf("error:\n%s\nwant in it:\n%s", got, want)
	}
}

func TestRefusedBySource(t *testing.T) {
	bad := map[string]string{"pod-cidrs": "x"}
	srcs := sources(t, bad)
	for name, where := range map[string]string{
		"flag": "flag --pod-cidrs", "env": "environment BAUTA_POD_CIDRS",
		"file":      "file " + srcs["file"].File + " key pod-cidrs",
		"directory": "directory file " + srcs["directory"].Dir + "/pod-cidrs",
	} {
		_, err := Load(srcs[name])
		checkRefused(t, err, `pod-cidrs "x" (`+where+"): not a CIDR")
	}
}

func TestRefusedFiles(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"pod-cidr: 10.0.0.0/8", "key pod-cidr: no such option\ndid you mean pod-cidrs?"},
		{"colour: blue", "key colour: no such option\nbauta agent --help"},
		{"devices: eth0\ndevices: eth1", "already set"},
		{"- devices", "not a mapping of option names to values"},
		{"devices: [eth0", "yaml: line 1"},
		{"devices: {a: b}", "a mapping, where a list is expected"},
		{"devices: [[eth0]]", "devices[0]"},
		{"devices: [eth0, '']", "devices[1]"},
		{"devices: !eth1", "!eth1: YAML takes an unquoted ! for a tag\nwrite \"!eth1\", with quotes"},
		{"devices:\n- !eth1\n", "!eth1: YAML takes an unquoted ! for a tag"},
		{"log-level: [info]", "a list, where one value is expected"},
		{"masquerade-forwarded: true\n---\ndevices: eth0\n", "2 YAML documents"},
	} {
		_, err := Load(Sources{File: file(t, c.text)})
		checkRefused(t, err, c.want)
	}
	_, err := Load(Sources{Flags: base, File: "/no/such/file"})
	checkRefused(t, err, "config file /no/such/file: no such file or directory\n")
	_, err = Load(Sources{Flags: base, Dir: "/no/such/dir"})
	checkRefused(t, err, "config directory /no/such/dir: no such file or directory\n")
	_, err = Load(Sources{Flags: base, File: t.TempDir()})
	checkRefused(t, err, "not a regular file")
	_, err = Load(Sources{Flags: map[string]string{"pod-cidr": "x"}})
	checkRefused(t, err, "flag --pod-cidr: no such option\ndid you mean pod-cidrs?")
	_, err = Load(Sources{Flags: map[string]string{"masquerade-forwarded": ""}})
	checkRefused(t, err, "no value")
}
