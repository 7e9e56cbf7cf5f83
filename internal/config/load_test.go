package config

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// base is enough for a configuration to be accepted.
var base = map[string]string{"masquerade-forwarded": "true"}

// samples is a value for every option that is not its default.
var samples = map[string]string{
	"enable-ipv4-masquerade":            "false",
	"enable-ipv6-masquerade":            "false",
	"enable-bpf-masquerade":             "false",
	"devices":                           "eth+,!eth1",
	"egress-masquerade-interfaces":      "eth0,eth1",
	"pod-cidrs":                         "10.0.0.0/16,fd00::/64",
	"masquerade-forwarded":              "true",
	"leak-sentinel":                     "true",
	"enable-masquerade-to-route-source": "true",
	"unknown-protocols":                 "drop",
	"ipv4-native-routing-cidr":          "10.0.0.0/8,192.168.0.0/16",
	"ipv6-native-routing-cidr":          "fd00::/8",
	"enable-ip-masq-agent":              "true",
	"ip-masq-agent-config-path":         "/etc/x",
	"ip-masq-agent-profile":             "strict",
	"remote-node-masquerade":            "external",
	"node-addresses":                    "192.0.2.1,2001:db8::1",
	"nodes-file":                        "/etc/nodes",
	"snat-port-range":                   "1024-29999,40000",
	"node-port-range":                   "30000-31000",
	"reserved-ports":                    "8080,50000-50010",
	"max-ports-per-pod":                 "1000",
	"max-new-flows-per-pod":             "100",
	"bpf-nat-global-max":                "65536",
	"nat-timeout-tcp-syn":               "1s",
	"nat-timeout-tcp-established":       "2s",
	"nat-timeout-tcp-closing":           "3s",
	"nat-timeout-udp":                   "4s",
	"nat-timeout-udp-stream":            "5s",
	"nat-timeout-icmp":                  "6s",
	"nat-timeout-other":                 "7s",
	"iptables-random-fully":             "true",
	"iptables-lock-timeout":             "1m",
	"drain-timeout":                     "1h",
	"take-over":                         "IP-MASQ-AGENT",
	"allow-private-bpffs":               "true",
	"enable-k8s":                        "true",
	"k8s-kubeconfig-path":               "/root/.kube/config",
	"k8s-node-name":                     "node-1",
	"k8s-startup-taint":                 "node.bauta.dev/agent-not-ready",
	"prometheus-serve-addr":             "127.0.0.1:9965",
	"metrics-per-pod":                   "20",
	"log-level":                         "debug",
	"log-format":                        "json",
}

// The names of section 4 of the contract are the options, no more, no less.
func TestOptionsAreThoseOfTheContract(t *testing.T) {
	var names []string
	for _, o := range Options() {
		names = append(names, o.Name)
		if o.Usage == "" || o.Group == "" || strings.HasSuffix(o.Usage, ".") {
			t.Errorf("%s: usage %q, group %q", o.Name, o.Usage, o.Group)
		}
		if o.Kind == Enum && len(o.Values) == 0 {
			t.Errorf("%s: an enum without values", o.Name)
		}
	}
	slices.Sort(names)
	if diff := cmp.Diff(slices.Sorted(maps.Keys(samples)), names); diff != "" {
		t.Error(diff)
	}
}

// file writes content to a file of its own.
func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bauta.yaml")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// dir writes a directory with a file an option.
func dir(t *testing.T, content map[string]string) string {
	t.Helper()
	path := t.TempDir()
	for name, text := range content {
		if err := os.WriteFile(filepath.Join(path, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// sources gives the same options through one source after the other.
func sources(t *testing.T, content map[string]string) map[string]Sources {
	var environ []string
	var yaml strings.Builder
	for name, text := range content {
		environ = append(environ, EnvName(name)+"="+text)
		yaml.WriteString(name + ": \"" + text + "\"\n")
	}
	return map[string]Sources{
		"flag":      {Flags: content},
		"env":       {Environ: environ},
		"file":      {File: file(t, yaml.String())},
		"directory": {Dir: dir(t, content)},
	}
}

// view is a configuration without where it came from.
func view(c Config) Config {
	c.effective, c.Ignored, c.Warnings = nil, nil, nil
	return c
}

var compare = cmp.Options{
	cmp.AllowUnexported(Config{}),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
}

// What names a chain or a rule is taken as it is; an old switch is off, or names nothing.
func TestTakeOver(t *testing.T) {
	rule := "-A POSTROUTING -s 10.0.1.0/24 ! -d 10.0.0.0/8 -j MASQUERADE"
	for text, want := range map[string]string{
		"IP-MASQ-AGENT": "IP-MASQ-AGENT", rule: rule, "false": "", "off": "", "": "", "true": Unnamed, "yes": Unnamed,
	} {
		c, err := Load(Sources{File: file(t, "masquerade-forwarded: true\ntake-over: "+text+"\n")})
		if err != nil || c.TakeOver != want || (want == Unnamed) != (len(c.Warnings) == 1) {
			t.Errorf("%q: %q, warnings %q, %v", text, c.TakeOver, c.Warnings, err)
		}
	}
}

// Every option means the same in every source, and does something.
func TestSourcesAgree(t *testing.T) {
	def, err := Load(Sources{Flags: base})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range Options() {
		t.Run(o.Name, func(t *testing.T) {
			content := maps.Clone(base)
			content[o.Name] = samples[o.Name]
			if o.Name == "masquerade-forwarded" {
				content["pod-cidrs"] = "10.0.0.0/16"
			}
			srcs := sources(t, content)
			want, err := Load(srcs["flag"])
			if err != nil {
				t.Fatal(err)
			}
			if cmp.Equal(view(want), view(def), compare) {
				t.Errorf("%s does nothing", samples[o.Name])
			}
			for name, src := range srcs {
				if name == "directory" && (o.Foreign || o.Name == "bpf-nat-global-max") {
					continue // tests of their own
				}
				got, err := Load(src)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if diff := cmp.Diff(view(want), view(got), compare); diff != "" {
					t.Errorf("%s: %s", name, diff)
				}
			}
		})
	}
}

// Of any two sources the higher one wins, also by an alias.
func TestPrecedence(t *testing.T) {
	order := []string{"flag", "env", "file", "directory"}
	high := sources(t, map[string]string{"ipv4-range": "10.1.0.0/16"})
	low := sources(t, map[string]string{"pod-cidrs": "10.2.0.0/16,fd00::/64"})
	for i, h := range order {
		for _, l := range order[i+1:] {
			src := high[h]
			other := low[l]
			src.Environ = append(src.Environ, other.Environ...)
			src.File, src.Dir = src.File+other.File, src.Dir+other.Dir
			c, err := Load(src)
			if err != nil {
				t.Fatal(err)
			}
			if len(c.PodCIDRs) != 1 || c.PodCIDRs[0].Prefix.String() != "10.1.0.0/16" || c.PodCIDRs[0].Origin != "option pod-cidrs" {
				t.Errorf("%s over %s: %v", h, l, c.PodCIDRs)
			}
		}
	}
}

func TestLists(t *testing.T) {
	for _, text := range []string{
		"pod-cidrs: 10.0.0.0/16,fd00::/64",
		"pod-cidrs: 10.0.0.0/16 fd00::/64",
		"pod-cidrs: ' 10.0.0.0/16 ,  fd00::/64 '",
		"pod-cidrs: [10.0.0.0/16, 'fd00::/64']",
		"pod-cidrs:\n- fd00::/64\n- 10.0.0.0/16\n- 10.0.0.0/16\n",
		"ipv4-range: 10.0.0.0/16\nipv6-range: fd00::/64",
		"ipv4-range: 10.0.0.0/16\npod-cidrs: [10.0.0.0/16, 'fd00::/64']",
		"\uFEFF# comment\r\n---\r\npod-cidrs: 10.0.0.0/16,fd00::/64\r\n---\r\n",
		"{\"pod-cidrs\": [\"10.0.0.0/16\", \"fd00::/64\"],\n\t\"devices\": \"\"}",
	} {
		c, err := Load(Sources{File: file(t, text)})
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		var got []string
		for _, r := range c.PodCIDRs {
			got = append(got, r.Prefix.String())
		}
		if diff := cmp.Diff([]string{"10.0.0.0/16", "fd00::/64"}, got); diff != "" {
			t.Errorf("%q: %s", text, diff)
		}
	}
}

// auto and empty mean the default, and in a higher source hide the lower ones.
func TestAutoAndEmpty(t *testing.T) {
	for _, text := range []string{"devices: auto", "devices:", "devices: ''", "devices: []", "devices: [auto]"} {
		c, err := Load(Sources{Flags: base, File: file(t, text), Dir: dir(t, map[string]string{"devices": "eth0"})})
		if err != nil || len(c.Devices) > 0 {
			t.Errorf("%q: devices %v, %v", text, c.Devices, err)
		}
	}
	c, err := Load(Sources{Flags: base, Environ: []string{"BAUTA_DEVICES="}, Dir: dir(t, map[string]string{"devices": "eth0"})})
	if err != nil || len(c.Devices) != 1 {
		t.Errorf("an empty variable is no setting: devices %v, %v", c.Devices, err)
	}
	c, err = Load(Sources{Flags: map[string]string{"pod-cidrs": "10.0.0.0/16", "ipv4-range": "auto", "enable-ipv6-masquerade": "auto"}})
	if err != nil || len(c.PodCIDRs) != 1 || c.IPv6Explicit {
		t.Errorf("auto beside a value: %v, %v", c.PodCIDRs, err)
	}
}

func TestCiliumConfig(t *testing.T) {
	path := dir(t, nil)
	version := filepath.Join(path, "..2026")
	if err := os.Mkdir(version, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("..2026", filepath.Join(path, "..data")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"ipv4-range":                    "auto",
		"ipv6-range":                    "auto",
		"masquerade-forwarded":          "true\n",
		"enable-ipv4-masquerade":        "true",
		"enable-ipv6-masquerade":        "false",
		"enable-bpf-masquerade":         "true",
		"ipv4-native-routing-cidr":      "10.0.0.0/8",
		"devices":                       "eth0 eth1",
		"egress-masquerade-interfaces":  "",
		"bpf-nat-global-max":            "524288",
		"node-port-range":               "30000,32767",
		"enable-remote-node-masquerade": "true",
		"iptables-lock-timeout":         "5s",
		"prometheus-serve-addr":         ":9962",
		"log-level":                     "debug",
		"cluster-pool-ipv4-cidr":        "10.0.0.0/8",
		"bpf-lb-map-max":                "65536",
	} {
		if err := os.WriteFile(filepath.Join(version, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(path, name)); err != nil {
			t.Fatal(err)
		}
	}
	c, err := Load(Sources{Dir: path})
	if err != nil {
		t.Fatal(err)
	}
	want := `enable-ipv6-masquerade false (directory file P/enable-ipv6-masquerade)
devices eth0,eth1 (directory file P/devices)
masquerade-forwarded true (directory file P/masquerade-forwarded)
ipv4-native-routing-cidr 10.0.0.0/8 (directory file P/ipv4-native-routing-cidr)
remote-node-masquerade true (directory file P/enable-remote-node-masquerade)
node-port-range 30000,32767 (directory file P/node-port-range)
bpf-nat-global-max 524288 (directory file P/bpf-nat-global-max)
`
	var got strings.Builder
	for i, e := range c.Effective() {
		if e.Source != fromDefault && e.Value != Options()[i].Default {
			got.WriteString(e.Option + " " + e.Value + " (" + strings.ReplaceAll(e.Source, path, "P") + ")\n")
		}
	}
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"bpf-lb-map-max", "cluster-pool-ipv4-cidr", "log-level", "prometheus-serve-addr"}, c.Ignored); diff != "" {
		t.Error(diff)
	}
	if c.MaxFlows != 262144 || c.RemoteNodes != "all" || c.MetricsAddr != "" || !slices.Equal(c.NodePorts, []PortRange{{30000, 32767}}) {
		t.Errorf("flows %d, remote nodes %s, metrics %q, node ports %v", c.MaxFlows, c.RemoteNodes, c.MetricsAddr, c.NodePorts)
	}
}

func TestNodeNameFromEnvironment(t *testing.T) {
	for _, c := range []struct{ environ, want string }{
		{"K8S_NODE_NAME=a", "a"},
		{"K8S_NODE_NAME=", ""},
		{"K8S_NODE_NAME=a BAUTA_K8S_NODE_NAME=b", "b"},
	} {
		got, err := Load(Sources{Flags: base, Environ: strings.Fields(c.environ)})
		if err != nil || got.NodeName != c.want {
			t.Errorf("%s: node name %q, %v", c.environ, got.NodeName, err)
		}
	}
}

func TestUnknownEnvironment(t *testing.T) {
	// A Service called bauta makes the kubelet set the last two.
	c, err := Load(Sources{Flags: base, Environ: []string{"BAUTA_POD_CIDR=10.0.0.0/8", "BAUTA_SERVICE_HOST=10.0.0.1", "BAUTA_PORT_9965_TCP=x"}})
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "did you mean BAUTA_POD_CIDRS?") {
		t.Errorf("warnings %q", c.Warnings)
	}
}

// FuzzValue: no text in any option panics, and an error always is an *Error that
// names the option and fits in a line.
func FuzzValue(f *testing.F) {
	for i, o := range Options() {
		f.Add(uint(i), samples[o.Name])
	}
	f.Fuzz(func(t *testing.T, i uint, text string) {
		o := Options()[i%uint(len(Options()))]
		flags := maps.Clone(base)
		flags[o.Name] = text
		c, err := Load(Sources{Flags: flags})
		if err == nil {
			if len(c.Effective()) != len(Options()) || len(c.Ports(nil)) == 0 {
				t.Fatalf("%s %q: %d effective options, %d ports", o.Name, text, len(c.Effective()), len(c.Ports(nil)))
			}
			return
		}
		if e, ok := errors.AsType[*Error](err); !ok || strings.Contains(e.Error(), "\n") || len(e.Hints) == 0 {
			t.Fatalf("%s %q: error %#v", o.Name, text, err)
		}
	})
}
