package e2e_test

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
)

// optionDir makes a directory with a file an option, as a mounted ConfigMap is.
func optionDir(t testing.TB, options map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	data := filepath.Join(dir, "..2026_1")
	must(t, os.Mkdir(data, 0o700))
	must(t, os.Symlink("..2026_1", filepath.Join(dir, "..data")))
	for name, value := range options {
		must(t, os.WriteFile(filepath.Join(data, name), []byte(value), 0o600))
		must(t, os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)))
	}
	return dir
}

// Each option comes from the highest source that gives it.
func TestOptionPrecedence(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	w := n.tapWorld()
	dir := "--config-dir=" + optionDir(t, map[string]string{
		"pod-cidrs": "10.0.10.0/24", "snat-port-range": "40000-40010", "enable-ipv6-masquerade": "false",
		"nat-timeout-udp": "10s",
	})
	file := "--config=" + n.write("config.yaml", "pod-cidrs: [10.0.11.0/24]\nsnat-port-range: 41000-41010\nenable-ipv6-masquerade: true\n")
	const env = "BAUTA_SNAT_PORT_RANGE=42000-42010"

	check := func(sources, ports string, ipv6 bool) {
		t.Helper()
		st := n.state()
		if len(st.Sources.IPv4.Ranges) != 1 || st.Sources.IPv4.Ranges[0].Prefix.String() != sources {
			t.Errorf("sources %+v, want %s", st.Sources.IPv4, sources)
		}
		if st.Ports.Ranges != ports {
			t.Errorf("ports %s, want %s", st.Ports.Ranges, ports)
		}
		if st.Masquerading.EnabledProtocols.IPv6 != ipv6 {
			t.Errorf("IPv6 is %v, want %v", st.Masquerading.EnabledProtocols.IPv6, ipv6)
		}
	}
	n.start(dir)
	check("10.0.10.0/24", "40000-40010", false)
	w.want(n.WorldAddr.V4, n.PodAddrs[0].V4) // it is in no source range
	n.stop()
	n.env = []string{env}
	n.start(dir, file)
	check("10.0.11.0/24", "42000-42010", true)
	n.stop()
	n.start(dir, file, "--snat-port-range=43000-43010", "--ipv4-range=10.0.1.0/24", "--enable-ipv6-masquerade=false")
	check("10.0.1.0/24", "43000-43010", false)
	w.want(n.WorldAddr.V4, n.NodeAddr.V4)
	w.want(n.WorldAddr.V6, n.PodAddrs[0].V6)
}

// A cilium-config as it is mounted: what is not ours is listed, nothing is refused.
func TestCiliumConfig(t *testing.T) {
	t.Parallel()
	dir := optionDir(t, map[string]string{
		"enable-ipv4-masquerade": "true", "enable-ipv6-masquerade": "false", "enable-bpf-masquerade": "true",
		"ipv4-native-routing-cidr": "10.0.0.0/16", "devices": "eth+", "enable-ip-masq-agent": "true",
		"bpf-nat-global-max": "65536", "enable-remote-node-masquerade": "false", "ipv4-range": "auto", "ipv6-range": "",
		"kube-proxy-replacement": "true", "cluster-name": "default", "prometheus-serve-addr": ":9962",
		"debug": "false", "identity-allocation-mode": "crd",
	})
	n := newNode(t, lab.Options{})
	n.env = []string{"BAUTA_IP_MASQ_AGENT_CONFIG_PATH=" + filepath.Join(n.dir, "none")}
	n.start("--config-dir="+dir, "--pod-cidrs=10.0.1.0/24")
	line, _, _ := strings.Cut(n.cli("status"), "\n")
	if want := n.line("Masquerading:   BPF (ip-masq-agent)   [eth0]   10.0.0.0/16 [IPv4: Enabled, IPv6: Disabled]"); line != want {
		t.Errorf("status: %q, want %q", line, want)
	}
	st := n.state()
	warnings := strings.Join(st.Warnings, "\n")
	for _, key := range []string{"kube-proxy-replacement", "cluster-name", "prometheus-serve-addr", "debug", "identity-allocation-mode"} {
		if !strings.Contains(warnings, key) {
			t.Errorf("status does not list %s as ignored: %q", key, st.Warnings)
		}
	}
	n.inBPF(func() {
		if st.Flows.IPv4.Limit != 32768 { // Cilium counts entries
			t.Errorf("%d flows", st.Flows.IPv4.Limit)
		}
	})
	if n.tapWorld().want(netip.MustParseAddr("10.0.99.9"), n.PodAddrs[0].V4); len(st.Degraded()) > 0 {
		t.Errorf("degraded: %q", st.Degraded())
	}
}

// What changes in the option files needs a restart, and is said; a mistake in
// them degrades, and is said at the next start.
func TestOptionFilesChange(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	path := n.write("config.yaml", "pod-cidrs: 10.0.1.0/24\n")
	n.start("--config=" + path)
	n.write("config.yaml", "pod-cidrs: 10.0.1.0/24\nsnat-port-range: 50000-60000\n")
	n.await("restart needed", func(st agent.Status) bool {
		return len(st.Degraded()) == 0 && slices.ContainsFunc(st.Warnings, func(s string) bool {
			return strings.Contains(s, "restart needed") && strings.Contains(s, "snat-port-range")
		})
	})
	if ports := n.state().Ports.Ranges; ports != "32768-65535" {
		t.Errorf("ports %s before the restart", ports)
	}
	n.write("config.yaml", "pod-cidrs: 10.0.1.0/24\nsnat-port-rang: 50000-60000\n")
	n.awaitDegraded("snat-port-rang")
	wantBrief(t, n, "config rejected", path, "snat-port-rang")
	n.stop()
	wantError(t, n.try("agent", "--allow-private-bpffs", "--config="+path), 1, path, "snat-port-rang", "hint: snat-port-range")
	if st := n.state(); st.Agent.State != agent.Down || !st.Datapath.Applied {
		t.Errorf("after a refused start: %+v %+v", st.Agent, st.Datapath)
	}
	n.write("config.yaml", "pod-cidrs: 10.0.1.0/24\nsnat-port-range: 50000-60000\n")
	n.start("--config=" + path)
	if st := n.awaitOK(); st.Ports.Ranges != "50000-60000" || len(st.Warnings) > 0 {
		t.Errorf("after the restart: %+v %q", st.Ports, st.Warnings)
	}
}

// Mistakes on the command line and in files: exit status, message, remedy.
func TestOptionErrors(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	file := func(name, content string) string { return "--config=" + n.write(name, content) }
	const pods = "--pod-cidrs=10.0.0.0/16"
	for _, c := range []struct {
		args  []string
		code  int
		texts []string
	}{
		{[]string{}, 1, []string{"source range", "pod-cidrs", "masquerade-forwarded", "hint: --pod-cidrs", "hint: --masquerade-forwarded"}},
		{[]string{"--bogus"}, 2, []string{"--bogus"}},
		{[]string{"--pod-cidr=10.0.0.0/16"}, 2, []string{"--pod-cidr", "hint: --pod-cidrs"}},
		{[]string{pods, "extra"}, 2, []string{"extra"}},
		{[]string{pods, "--enable-ip-masq-agent", "true"}, 2, []string{"true", "hint: --OPTION=true"}},
		{[]string{"--pod-cidrs=10.0.0.0/33"}, 1, []string{"pod-cidrs", "10.0.0.0/33", "hint: write"}},
		{[]string{"--pod-cidrs=10.0.0.1/16"}, 1, []string{"10.0.0.1/16", "hint: 10.0.0.0/16"}},
		{[]string{"--pod-cidrs=10.0.0.1"}, 1, []string{"10.0.0.1", "hint: 10.0.0.1/32"}},
		{[]string{"--ipv4-range=fd00::/64"}, 1, []string{"ipv4-range", "fd00::/64"}},
		{[]string{pods, "--ipv4-range=10.1.0.0/16"}, 1, []string{"pod-cidrs", "ipv4-range", "10.1.0.0/16"}},
		{[]string{pods, "--ipv4-native-routing-cidr=10.0.0.0"}, 1, []string{"ipv4-native-routing-cidr", `"10.0.0.0"`}},
		{[]string{pods, "--snat-port-range=30000-40000"}, 1, []string{"snat-port-range", "30000-40000", "node-port-range", "30000-32767", "hint: 1024-29999,32768-65535"}},
		{[]string{pods, "--snat-port-range=40000-30000"}, 1, []string{"snat-port-range", "40000-30000"}},
		{[]string{pods, "--snat-port-range=40000-40010", "--reserved-ports=40000-40010"}, 1, []string{"no port from 1024 on is left"}},
		{[]string{pods, "--devices=eth0/x"}, 1, []string{"devices", "eth0/x"}},
		{[]string{pods, "--devices=averyveryverylongname"}, 1, []string{"devices", "averyveryverylongname"}},
		// In iptables mode they may differ, and then so does the mode of this case.
		{[]string{pods, "--devices=eth0", "--egress-masquerade-interfaces=eth1", "--enable-bpf-masquerade=true"}, 1, []string{"devices", "egress-masquerade-interfaces"}},
		{[]string{pods, "--ip-masq-agent-profile=gke"}, 1, []string{"ip-masq-agent-profile", "gke", "hint: upstream"}},
		{[]string{pods, "--remote-node-masquerade=some"}, 1, []string{"remote-node-masquerade", "some", "hint: external"}},
		{[]string{pods, "--node-addresses=192.0.2.300"}, 1, []string{"node-addresses", "192.0.2.300"}},
		{[]string{pods, "--nat-timeout-udp=5"}, 1, []string{"nat-timeout-udp", "hint: 5s"}},
		{[]string{pods, "--bpf-nat-global-max=12"}, 1, []string{"bpf-nat-global-max", "hint: 1024"}},
		{[]string{pods, "--enable-ipv4-masquerade=maybe"}, 1, []string{"enable-ipv4-masquerade", "maybe"}},
		{[]string{"--config=/nonexistent"}, 1, []string{"/nonexistent", "no such file"}},
		{[]string{"--config-dir=/nonexistent"}, 1, []string{"/nonexistent", "no such file"}},
		{[]string{file("unknown.yaml", "pod-cidrs: 10.0.0.0/16\npodcidrs: x\n")}, 1, []string{"unknown.yaml", "podcidrs"}},
		{[]string{file("tag.yaml", "pod-cidrs: 10.0.0.0/16\ndevices: !eth1\n")}, 1, []string{"tag.yaml", "!eth1", "hint: quotes"}},
		{[]string{file("yaml.yaml", "pod-cidrs: [10.0.0.0/16\n")}, 1, []string{"yaml.yaml"}},
		{[]string{file("value.yaml", "pod-cidrs: [10.0.0.0/16, 10.1.0.0/99]\n")}, 1, []string{"value.yaml", "pod-cidrs", "10.1.0.0/99"}},
		{[]string{"--config-dir=" + optionDir(t, map[string]string{"pod-cidrs": "10.0.0.0/99"})}, 1, []string{"pod-cidrs", "10.0.0.0/99"}},
	} {
		t.Run(strings.ReplaceAll(strings.Join(c.args, " "), "/", "|"), func(t *testing.T) {
			wantError(t, n.try(append([]string{"agent", "--allow-private-bpffs"}, c.args...)...), c.code, c.texts...)
		})
	}
	if _, err := os.Stat(n.bpfRoot); err == nil {
		t.Error("a refused start left a data plane")
	}
	if _, err := os.Stat(n.runDir); err == nil {
		t.Error("a refused start left a run directory")
	}
}

// With both families off the agent runs, and nothing is masqueraded or degraded.
func TestBothFamiliesOff(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	n.start("--enable-ipv4-masquerade=false", "--enable-ipv6-masquerade=false")
	r := n.try("status")
	if line, _, _ := strings.Cut(r.stdout, "\n"); r.code != 0 || line != "Masquerading:   Disabled" {
		t.Errorf("status: exit %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if out := n.cli("status", "--brief"); out != "OK\n" {
		t.Errorf("status --brief: %q", out)
	}
	if st := n.state(); st.Masquerading.Enabled || st.Masquerading.EnabledProtocols.IPv4 || st.Sources.IPv4.State != agent.SourcesOff {
		t.Errorf("%+v %+v", st.Masquerading, st.Sources)
	}
	w := n.tapWorld()
	w.want(n.WorldAddr.V4, n.PodAddrs[0].V4)
	w.want(n.WorldAddr.V6, n.PodAddrs[0].V6)
	n.agent.cmd.Process.Signal(syscall.SIGHUP)
	n.stop()
}

// config validate checks files as the agent would read them.
func TestConfigValidate(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	good := n.write("config.yaml", "pod-cidrs: [10.0.0.0/16, 'fd00::/64']\ndevices: [eth+]\n")
	list := n.writeList("10.0.0.1/8", "2001:db8::/32")
	out := n.cli("config", "validate", good, list)
	for _, text := range []string{good, "valid", "10.0.0.0/16", "fd00::/64", "eth+", list, "profile cilium", "10.0.0.0/8", "profile strict: rejected", "profile upstream: rejected"} {
		if !strings.Contains(out, text) {
			t.Errorf("%q is missing in:\n%s", text, out)
		}
	}
	wantError(t, n.try("config", "validate", list, "--profile=strict"), 1, list, "10.0.0.1/8")
	wantError(t, n.try("config", "validate", n.write("bad.yaml", "pod-cidrs: x\n")), 1, "bad.yaml", "pod-cidrs")
	wantError(t, n.try("config", "validate", "/nonexistent"), 1, "/nonexistent")
	r := n.try("config", "validate", good, n.write("bad.yaml", "nonMasqueradeCIDRs: [x]\n"), "-o", "json")
	var verdicts []struct {
		Subject, Error string
		Valid          bool
	}
	if err := json.Unmarshal([]byte(r.stdout), &verdicts); err != nil || r.code != 1 || len(verdicts) != 2 || !verdicts[0].Valid || verdicts[1].Valid || !strings.Contains(verdicts[1].Error, "nonMasqueradeCIDRs[0]") {
		t.Errorf("%v %+v\n%s%s", err, verdicts, r.stdout, r.stderr)
	}
	dir := optionDir(t, map[string]string{"pod-cidrs": "10.0.0.0/16", "debug": "true"})
	if out := n.cli("config", "validate", "--config-dir", dir); !strings.Contains(out, "debug") || !strings.Contains(out, "10.0.0.0/16") {
		t.Errorf("directory:\n%s", out)
	}
}
