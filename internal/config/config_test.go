package config

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"bauta.dev/bauta/internal/policy"
)

// load loads options given as "NAME=VALUE NAME=VALUE".
func load(t *testing.T, options string) Config {
	t.Helper()
	flags := make(map[string]string)
	for kv := range strings.FieldsSeq(options) {
		k, v, _ := strings.Cut(kv, "=")
		flags[k] = v
	}
	c, err := Load(Sources{Flags: flags})
	if err != nil {
		t.Fatalf("%s: %v", options, err)
	}
	return c
}

func TestDefaults(t *testing.T) {
	c := load(t, "masquerade-forwarded=true")
	if !c.IPv4 || !c.IPv6 || c.IPv6Explicit || !c.BPF || c.RemoteNodesSet || c.MaxFlows != 0 {
		t.Errorf("%+v", c)
	}
	if c.Timeouts != policy.DefaultTimeouts {
		t.Errorf("timeouts %+v", c.Timeouts)
	}
	if p := c.Ports(nil); len(p) != 32768 || p[0] != 32768 || p[len(p)-1] != 65535 {
		t.Errorf("%d ports from %d", len(p), p[0])
	}
	if len(c.Warnings)+len(c.Ignored) > 0 {
		t.Errorf("warnings %q, ignored %q", c.Warnings, c.Ignored)
	}
}

func TestBothFamiliesOffNeedNoRange(t *testing.T) {
	load(t, "enable-ipv4-masquerade=false enable-ipv6-masquerade=false")
}

// rules prints rules as "PREFIX (ORIGIN)".
func rules(rs []policy.Rule) string {
	texts := make([]string, len(rs))
	for i, r := range rs {
		texts[i] = fmt.Sprintf("%s (%s)", r.Prefix, strings.TrimPrefix(r.Origin, "option "))
	}
	return strings.Join(texts, " ")
}

func TestSourceAndNativeRules(t *testing.T) {
	for _, c := range []struct{ options, sources, native string }{
		{"pod-cidrs=10.0.0.0/16,fd00::/64", "10.0.0.0/16 (pod-cidrs) fd00::/64 (pod-cidrs)", "10.0.0.0/16 (pod-cidrs) fd00::/64 (pod-cidrs)"},
		{"pod-cidrs=10.0.0.0/16 enable-ip-masq-agent=true", "10.0.0.0/16 (pod-cidrs)", ""},
		{"pod-cidrs=10.0.0.0/16,fd00::/64 ipv4-native-routing-cidr=10.0.0.0/8,192.168.0.0/16", "10.0.0.0/16 (pod-cidrs) fd00::/64 (pod-cidrs)",
			"10.0.0.0/8 (ipv4-native-routing-cidr) 192.168.0.0/16 (ipv4-native-routing-cidr) fd00::/64 (pod-cidrs)"},
		{"pod-cidrs=10.0.0.0/16 enable-ip-masq-agent=true ipv6-native-routing-cidr=fd00::/8", "10.0.0.0/16 (pod-cidrs)", "fd00::/8 (ipv6-native-routing-cidr)"},
		{"masquerade-forwarded=true", "0.0.0.0/0 (masquerade-forwarded) fc00::/7 (masquerade-forwarded)", ""},
		{"masquerade-forwarded=true enable-ipv6-masquerade=true", "0.0.0.0/0 (masquerade-forwarded) ::/0 (masquerade-forwarded)", ""},
	} {
		cfg := load(t, c.options)
		if got := rules(cfg.SourceRules(nil)); got != c.sources {
			t.Errorf("%s: sources %s, want %s", c.options, got, c.sources)
		}
		if got := rules(cfg.NativeRules(nil)); got != c.native {
			t.Errorf("%s: native %s, want %s", c.options, got, c.native)
		}
	}
	node := []policy.Rule{{Prefix: load(t, "pod-cidrs=10.9.0.0/24").PodCIDRs[0].Prefix, Origin: "node a"}}
	c := load(t, "enable-k8s=true")
	if got := rules(c.SourceRules(node)) + rules(c.NativeRules(node)); got != "10.9.0.0/24 (node a)10.9.0.0/24 (node a)" {
		t.Error(got)
	}
}

func TestDevices(t *testing.T) {
	for _, c := range []struct{ devices, selected, excluded, names string }{
		{"eth0,eth1", "eth0 eth1", "", "eth0 eth1"},
		{"eth+", "eth0 eth1 eth10", "", ""},
		{"!eth1", "", "eth1", ""},
		{"!eth1+,eth+", "eth0", "eth1 eth10", ""},
		{"eth+,!eth1", "eth0 eth1 eth10", "", ""}, // the first that matches decides
		{"+", "eth0 eth1 eth10 lo", "", ""},
	} {
		f := load(t, "masquerade-forwarded=true devices="+c.devices).Devices
		var selected, excluded []string
		for _, d := range []string{"eth0", "eth1", "eth10", "lo"} {
			s, e := f.Match(d)
			if s {
				selected = append(selected, d)
			}
			if e {
				excluded = append(excluded, d)
			}
		}
		got := []string{strings.Join(selected, " "), strings.Join(excluded, " "), strings.Join(f.Names(), " "), f.String()}
		if diff := cmp.Diff([]string{c.selected, c.excluded, c.names, c.devices}, got); diff != "" {
			t.Errorf("%s: %s", c.devices, diff)
		}
		if f.Selects() != (c.selected != "") {
			t.Errorf("%s: selects %t", c.devices, f.Selects())
		}
	}
	c := load(t, "masquerade-forwarded=true devices=eth0,eth1 egress-masquerade-interfaces=eth1,eth0")
	if c.MasqueradeDevices().String() != "eth1,eth0" {
		t.Errorf("both, the same: %s", c.MasqueradeDevices())
	}
	c = load(t, "masquerade-forwarded=true devices=eth0 egress-masquerade-interfaces=eth1,wlan+ enable-bpf-masquerade=false")
	if c.MasqueradeDevices().String() != "eth1,wlan+" || len(c.Warnings) != 1 || !strings.HasPrefix(c.Warnings[0], `devices "eth0" (flag --devices) has no effect`) {
		t.Errorf("both in iptables mode: %s, %q", c.MasqueradeDevices(), c.Warnings)
	}
	c = load(t, "masquerade-forwarded=true devices=eth0 egress-masquerade-interfaces=eth0 enable-bpf-masquerade=false")
	if len(c.Warnings) != 0 {
		t.Errorf("both the same in iptables mode: %q", c.Warnings)
	}
}

func TestPorts(t *testing.T) {
	c := load(t, "masquerade-forwarded=true snat-port-range=40010-40020,1024-1030,40015-40025 reserved-ports=1025,40012-40099")
	want := []uint16{1024, 1026, 1027, 1029, 1030, 40010, 40011}
	if got := c.Ports([]PortRange{{1028, 1028}}); !slices.Equal(got, want) {
		t.Errorf("ports %v, want %v", got, want)
	}
	c = load(t, "masquerade-forwarded=true snat-port-range=2-65535 node-port-range=1 reserved-ports=2-65534")
	if got := c.Ports(nil); !slices.Equal(got, []uint16{65535}) {
		t.Errorf("ports %v", got)
	}
}

func TestReservedPorts(t *testing.T) {
	for text, want := range map[string]string{
		"\n": "[]", "": "[]", "8080\n": "[8080]", "8080,9000-9100,9101\n": "[8080 9000-9101]", "0": "[0]",
	} {
		got, err := ParseReservedPorts(text)
		if err != nil || fmt.Sprint(got) != want {
			t.Errorf("%q: %v, %v, want %s", text, got, err, want)
		}
	}
	for _, text := range []string{"x", "1-", "2-1", "65536"} {
		if _, err := ParseReservedPorts(text); err == nil {
			t.Errorf("%q accepted", text)
		}
	}
}

func TestFlows(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		value  string
		memory uint64
		want   uint32
	}{
		{"auto", gib / 2, 32768}, {"0", 4 * gib, 65536}, {"0", 16 * gib, 262144}, {"0", 1024 * gib, 1048576},
		{"1024", gib, 1024}, {"100000", gib, 131072}, {"131072", gib, 131072}, {"16777216", gib, 16777216},
	} {
		if got := load(t, "masquerade-forwarded=true bpf-nat-global-max="+c.value).Flows(c.memory); got != c.want {
			t.Errorf("%s, %d GiB: %d flows, want %d", c.value, c.memory/gib, got, c.want)
		}
	}
	small, err := Load(Sources{Dir: dir(t, map[string]string{"masquerade-forwarded": "true", "bpf-nat-global-max": "1024"})})
	if err != nil || small.MaxFlows != 1024 || len(small.Warnings) != 1 {
		t.Errorf("Cilium's smallest table: %d flows, %q, %v", small.MaxFlows, small.Warnings, err)
	}
}

func TestWarnings(t *testing.T) {
	for options, want := range map[string]string{
		"iptables-random-fully=true":                           "iptables-random-fully \"true\" (flag --iptables-random-fully) has no effect: enable-bpf-masquerade is true",
		"enable-bpf-masquerade=false nat-timeout-udp=1m":       "nat-timeout-udp \"1m\" (flag --nat-timeout-udp) has no effect: enable-bpf-masquerade is false",
		"ip-masq-agent-profile=strict":                         "has no effect: enable-ip-masq-agent is false",
		"ipv4-native-routing-cidr=0.0.0.0/0":                   "option ipv4-native-routing-cidr 0.0.0.0/0: nothing of this family is masqueraded",
		"enable-ipv6-masquerade=false pod-cidrs=fd00::/64":     "option pod-cidrs fd00::/64 has no effect",
		"iptables-random-fully=false nat-timeout-udp=2m":       "",
		"enable-bpf-masquerade=false iptables-lock-timeout=1s": "",
	} {
		got := strings.Join(load(t, "masquerade-forwarded=true "+options).Warnings, "\n")
		if !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%s: warnings %q, want %q", options, got, want)
		}
	}
}

func TestEffective(t *testing.T) {
	c := load(t, "ipv4-range=10.0.0.0/16 ipv6-range=fd00::/64")
	line := "pod-cidrs                           10.0.0.0/16,fd00::/64       flag --ipv4-range, flag --ipv6-range\n"
	if text := c.EffectiveText(); !strings.Contains(text, line) || strings.Count(text, "\n") != len(Options()) {
		t.Error(text)
	}
	data, err := json.Marshal(c.Effective()[0])
	if err != nil || string(data) != `{"option":"enable-ipv4-masquerade","value":"true","source":"default"}` {
		t.Errorf("%s, %v", data, err)
	}
	d := load(t, "pod-cidrs=,10.0.0.0/16,fd00::/64 drain-timeout=1m")
	if diff := cmp.Diff([]string{"drain-timeout"}, c.Changed(d)); diff != "" {
		t.Error(diff)
	}
}

func TestParseNodes(t *testing.T) {
	nodes, err := ParseNodes(strings.NewReader("\uFEFF# nodes\r\n\r\n192.0.2.1\r\n192.0.2.2 b # second\n2001:db8::2 b ExternalIP\n192.0.2.1\n"), "/n")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range nodes {
		got = append(got, fmt.Sprintf("%s %q %s %s", n.Addr, n.Node, n.Type, n.Origin))
	}
	want := []string{`192.0.2.1 "" InternalIP file /n`, `192.0.2.2 "b" InternalIP file /n`, `2001:db8::2 "b" ExternalIP file /n`}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for text, want := range map[string]string{
		"192.0.2.1\n192.0.2.300 b":           `/n:2: "192.0.2.300": not an IP address`,
		"192.0.2.1 a External":               `/n:1: "External": not a type (InternalIP, ExternalIP or Hostname)`,
		"192.0.2.1 a InternalIP more":        `/n:1: "192.0.2.1 a InternalIP more": more than`,
		"192.0.2.0/24":                       `/n:1: "192.0.2.0/24": not an IP address`,
		"::ffff:192.0.2.1":                   "write 192.0.2.1",
		"fe80::1%eth0":                       "has a zone",
		"0.0.0.0":                            "not the address of a node",
		"# a\n" + strings.Repeat("x", 1<<17): "/n: ",
	} {
		if nodes, err := ParseNodes(strings.NewReader(text), "/n"); err == nil || !strings.Contains(err.Error(), want) || nodes != nil {
			t.Errorf("%.40q: %v, want %s", text, err, want)
		}
	}
}
