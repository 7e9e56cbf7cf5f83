package chart_test

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/policy"
)

// pod is what the tests look at of the agents' pods.
type pod struct {
	HostNetwork, HostPID, AutomountServiceAccountToken bool
	DNSPolicy, PriorityClassName, ServiceAccountName   string
	SecurityContext                                    struct {
		SeccompProfile, AppArmorProfile struct{ Type string }
	}
	InitContainers, Containers []container
	Volumes                    []volume
}

type container struct {
	Name, Image     string
	Args            []string
	Env             []struct{ Name, Value string }
	Ports           []struct{ ContainerPort, HostPort int }
	SecurityContext struct {
		RunAsUser                                                    int
		Privileged, AllowPrivilegeEscalation, ReadOnlyRootFilesystem *bool
		Capabilities                                                 struct{ Drop, Add []string }
	}
	StartupProbe, LivenessProbe, ReadinessProbe *probe
	VolumeMounts                                []mount
}

type probe struct {
	HTTPGet struct {
		Host, Path string
		Port       int
	}
}

type mount struct {
	Name, MountPath, MountPropagation, SubPath string
	ReadOnly                                   bool
}

type volume struct {
	Name      string
	HostPath  *struct{ Path, Type string }
	ConfigMap *struct {
		Name     string
		Optional bool
	}
	Projected *struct {
		Sources []struct {
			ConfigMap struct {
				Name     string
				Optional bool
				Items    []struct{ Key, Path string }
			}
		}
	}
}

// podOf is the pod of the DaemonSet of that name.
func podOf(t *testing.T, all map[string]object, name string) pod {
	t.Helper()
	ds := all["DaemonSet "+name]
	if ds == nil {
		t.Fatalf("no DaemonSet %s", name)
	}
	return into[pod](t, ds.get("spec", "template", "spec"))
}

// mounted writes a ConfigMap's data as the kubelet mounts it.
func mounted(t *testing.T, data map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "..2026_11_27"), 0o755); err != nil {
		t.Fatal(err)
	}
	link := func(target, name string) {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	link("..2026_11_27", "..data")
	for key, text := range data {
		if err := os.WriteFile(filepath.Join(dir, "..2026_11_27", key), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		link("..data/"+key, key)
	}
	return dir
}

func ciliumConfig(t *testing.T) (data map[string]string) {
	t.Helper()
	text, err := os.ReadFile("testdata/cilium-config.yaml")
	if err == nil {
		err = yaml.UnmarshalStrict(text, &data)
	}
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// load reads the agent's options as the agent in the rendered pod would.
func load(t *testing.T, all map[string]object) config.Config {
	t.Helper()
	agent := podOf(t, all, "bauta").Containers[0]
	maps := map[string]map[string]string{
		"bauta-config":  into[map[string]string](t, all["ConfigMap bauta-config"].get("data")),
		"cilium-config": ciliumConfig(t),
	}
	path := func(inPod string) string { return realPath(t, all, maps, inPod) }
	src := config.Sources{Flags: make(map[string]string), Environ: []string{"K8S_NODE_NAME=node-1"}}
	for _, arg := range agent.Args[1:] {
		name, value, ok := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		switch {
		case !ok:
			t.Fatalf("argument %s", arg)
		case name == "config-dir":
			src.Dir = path(value)
		case name == "config":
			src.File = path(value)
		default:
			src.Flags[name] = value
		}
	}
	if agent.Args[0] != "agent" || src.Dir == "" {
		t.Fatalf("arguments %q", agent.Args)
	}
	cfg, err := config.Load(src)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// realPath is where a path in the pod is here: a directory mounted from a ConfigMap, or a file in it.
func realPath(t *testing.T, all map[string]object, data map[string]map[string]string, inPod string) string {
	t.Helper()
	p := podOf(t, all, "bauta")
	for _, m := range p.Containers[0].VolumeMounts {
		rest, ok := strings.CutPrefix(inPod, m.MountPath)
		if !ok || rest != "" && rest[0] != '/' {
			continue
		}
		i := slices.IndexFunc(p.Volumes, func(v volume) bool { return v.Name == m.Name })
		if i < 0 || p.Volumes[i].ConfigMap == nil || data[p.Volumes[i].ConfigMap.Name] == nil {
			t.Fatalf("%s: not from a ConfigMap that there is", inPod)
		}
		return filepath.Join(mounted(t, data[p.Volumes[i].ConfigMap.Name]), rest)
	}
	t.Fatalf("%s: on no mount", inPod)
	return ""
}

// given are the options that a source besides the defaults gives.
func given(cfg config.Config) map[string]string {
	values := make(map[string]string)
	for _, e := range cfg.Effective() {
		if e.Source != "default" {
			values[e.Option] = e.Value
		}
	}
	return values
}

// What the agent understands of what the chart writes, option by option.
func TestOptionsArrive(t *testing.T) {
	t.Parallel()
	always := map[string]string{"enable-k8s": "true", "k8s-node-name": "node-1", "prometheus-serve-addr": "127.0.0.1:9977",
		"enable-bpf-masquerade": "true", "enable-ip-masq-agent": "false"}
	for _, c := range []struct {
		set  string
		want map[string]string // besides always; empty: not given
	}{
		{"defaults", nil},
		{"ipmasq", map[string]string{
			"enable-ip-masq-agent": "true", "ip-masq-agent-config-path": "/etc/bauta/ip-masq-agent", "ipv4-native-routing-cidr": "10.0.0.0/16"}},
		// Above what cilium-config says; and its own port is not served.
		{"adopted", map[string]string{
			"enable-ip-masq-agent": "true", "ip-masq-agent-config-path": "/etc/bauta/ip-masq-agent", "ip-masq-agent-profile": "upstream",
			"remote-node-masquerade": "external", "bpf-nat-global-max": "1048576",
			"devices": "eth0,eth1", "enable-ipv4-masquerade": "true", "enable-ipv6-masquerade": "false",
			"enable-masquerade-to-route-source": "true", "ipv4-native-routing-cidr": "10.0.0.0/8"}},
		{"iptables", map[string]string{
			"enable-bpf-masquerade": "false", "egress-masquerade-interfaces": "eth+,ens3", "enable-masquerade-to-route-source": "true",
			"iptables-random-fully": "true", "take-over": "IP-MASQ-AGENT", "drain-timeout": "30m", "iptables-lock-timeout": "10s"}},
		{"everything", map[string]string{
			"enable-ipv4-masquerade": "true", "enable-ipv6-masquerade": "true", "ipv4-native-routing-cidr": "10.0.0.0/16,10.1.0.0/16",
			"ipv6-native-routing-cidr": "fd00::/8", "bpf-nat-global-max": "1048576", "devices": "eth0,eth+,!eth9",
			"egress-masquerade-interfaces": "eth0,eth+,!eth9", "enable-masquerade-to-route-source": "false", "remote-node-masquerade": "all",
			"pod-cidrs": "10.244.0.0/16,fd00:10:244::/56", "masquerade-forwarded": "false", "node-port-range": "31000-32767",
			"snat-port-range": "1024-30999,32768-65535", "unknown-protocols": "drop", "reserved-ports": "40000,50000-50100",
			"max-ports-per-pod": "4096", "max-new-flows-per-pod": "20000", "leak-sentinel": "true", "node-addresses": "192.0.2.10",
			"nat-timeout-tcp-syn": "1m", "nat-timeout-tcp-established": "3h", "nat-timeout-tcp-closing": "1m", "nat-timeout-udp": "1m",
			"nat-timeout-udp-stream": "4m", "nat-timeout-icmp": "30s", "nat-timeout-other": "5m", "metrics-per-pod": "100",
			"k8s-startup-taint": "node.bauta.dev/agent-not-ready", "prometheus-serve-addr": ":9978", "log-level": "debug", "log-format": "json"}},
	} {
		t.Run(c.set, func(t *testing.T) {
			t.Parallel()
			want := maps.Clone(always)
			maps.Copy(want, c.want)
			cfg := load(t, objects(t, template(t, c.set)))
			if diff := cmp.Diff(want, given(cfg)); diff != "" {
				t.Errorf("options (-want +got):\n%s", diff)
			}
			if c.set != "adopted" && len(cfg.Ignored) > 0 {
				t.Errorf("no options: %q", cfg.Ignored)
			}
			if len(cfg.Warnings) > 0 {
				t.Errorf("warnings %q", cfg.Warnings)
			}
		})
	}
}

// notOfTheChart are the options that no value gives, with the reason.
var notOfTheChart = map[string]string{
	"k8s-kubeconfig-path": "the pod has a ServiceAccount",
	"nodes-file":          "the nodes come from the API server; no file is mounted",
	"allow-private-bpffs": "for labs only",
}

// Every option can be given by a value, or there is a reason.
func TestEveryOptionHasAValue(t *testing.T) {
	t.Parallel()
	reached := make(map[string]bool)
	for _, set := range sets {
		if set == "cleanup" {
			continue
		}
		for option := range given(load(t, objects(t, template(t, set)))) {
			reached[option] = true
		}
	}
	for _, o := range config.Options() {
		switch why, not := notOfTheChart[o.Name], notOfTheChart[o.Name] != ""; {
		case not && reached[o.Name]:
			t.Errorf("%s: a set gives it, though %s", o.Name, why)
		case !not && !reached[o.Name]:
			t.Errorf("%s: no set in testdata gives it; add it to extraConfig in values.schema.json, and to everything.values.yaml", o.Name)
		}
	}
}

// Values mean what they mean to Cilium. A number of entries is the same table wherever it is given.
func TestCiliumsMeaning(t *testing.T) {
	t.Parallel()
	flows := func(set ...string) uint32 {
		t.Helper()
		return load(t, objects(t, template(t, "defaults", "--set", strings.Join(set, ",")))).MaxFlows
	}
	remote := func(set string) policy.RemoteNodes {
		t.Helper()
		return load(t, objects(t, template(t, "defaults", "--set", set))).RemoteNodes
	}
	if got := remote("enableRemoteNodeMasquerade=true"); got != remote("remoteNodeMasquerade=all") || got == remote("remoteNodeMasquerade=none") {
		t.Errorf("enableRemoteNodeMasquerade: %v", got)
	}
	if a, b := flows("bpf.natMax=300001"), flows("bpf.natMax=300001", "existingConfigDirConfigMap=cilium-config"); a != b || a != 1<<18 {
		t.Errorf("%d and %d flows, want %d", a, b, 1<<18)
	}
}
