package chart_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

func TestLint(t *testing.T) {
	t.Parallel()
	for _, set := range sets {
		out := helm(t, "lint", "--strict", "--kube-version", kubeVersion, "--values", valuesFile(set), chartDir)
		if !strings.Contains(out, "1 chart(s) linted, 0 chart(s) failed") {
			t.Errorf("%s: %s", set, out)
		}
	}
}

func TestGoldens(t *testing.T) {
	t.Parallel()
	for _, set := range sets {
		t.Run(set, func(t *testing.T) {
			t.Parallel()
			golden(t, filepath.Join("testdata", set+".golden.yaml"), withoutFiles(t, template(t, set)))
		})
	}
}

// withoutFiles names the files of the chart instead of having their text: they are tested where they are made.
func withoutFiles(t *testing.T, rendered string) string {
	t.Helper()
	for name, indent := range map[string]string{"alerts.yaml": "  ", "dashboard.json": "    "} {
		text := chartFile(t, name)
		text = indent + strings.ReplaceAll(text, "\n", "\n"+indent)
		rendered = strings.ReplaceAll(rendered, text, indent+"(files/"+name+")")
	}
	return rendered
}

func chartFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(chartDir, "files", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Alerts and dashboard arrive as they are in their files: what Prometheus and Grafana expand is not helm's.
func TestFilesArrive(t *testing.T) {
	t.Parallel()
	all := objects(t, template(t, "everything"))
	if got := all["ConfigMap bauta-dashboard"].get("data", "bauta.json"); got != chartFile(t, "dashboard.json") {
		t.Errorf("another dashboard:\n%s", got)
	}
	var rules map[string]any
	if err := yaml.UnmarshalStrict([]byte(chartFile(t, "alerts.yaml")), &rules); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(any(rules), all["PrometheusRule bauta"].get("spec")); diff != "" || len(rules) == 0 {
		t.Errorf("rules (-file +rendered):\n%s", diff)
	}
}

// What helm tells after an install.
func TestNotes(t *testing.T) {
	t.Parallel()
	for _, set := range sets {
		t.Run(set, func(t *testing.T) {
			t.Parallel()
			golden(t, filepath.Join("testdata", set+".notes.txt"), notes(t, "--values", valuesFile(set)))
		})
	}
}

func notes(t *testing.T, args ...string) string {
	t.Helper()
	out := helm(t, append([]string{"install", "bauta", chartDir, "--namespace", namespace, "--dry-run=client"}, args...)...)
	_, text, ok := strings.Cut(out, "\nNOTES:\n")
	if !ok {
		t.Fatalf("no notes in\n%s", out)
	}
	return text
}

// What works, but hardly as meant, is said.
func TestNotesWarn(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ set, want string }{
		{"enableIPv4Masquerade=false,enableIPv6Masquerade=false", "NOTE: enableIPv4Masquerade and enableIPv6Masquerade are both false: nothing is masqueraded."},
		{"ipMasqAgent.config.masqLinkLocal=true", "NOTE: ipMasqAgent.config has no effect: ipMasqAgent.enabled is false."},
		{"ipMasqAgent.fragments={a}", "NOTE: ipMasqAgent has no effect: ipMasqAgent.enabled is false."},
		{"ipMasqAgent.enabled=true,ipMasqAgent.config.masqLinkLocal=true", "NOTE: ipMasqAgent.config has no nonMasqueradeCIDRs: everything but link-local destinations is masqueraded"},
		{"bpf.masquerade=false,bpf.natMax=100000", "NOTE: bpf.natMax has no effect in iptables mode."},
		{"iptablesRandomFully=true", "NOTE: iptablesRandomFully has no effect in eBPF mode."},
		{"masqueradeForwarded=true", "NOTE: masqueradeForwarded: "},
		{"takeOver=IP-MASQ-AGENT", "NOTE: takeOver: "},
		{"startupTaint.enabled=true", "NOTE: startupTaint: nodes have to register with node.bauta.dev/agent-not-ready:NoSchedule"},
		{"existingConfigDirConfigMap=cilium-config", "NOTE: existingConfigDirConfigMap: a change of cilium-config takes effect when the pods are replaced"},
		{"resources.limits.memory=1Gi,bpf.natMax=2097152", "NOTE: resources.limits.memory: "},
		{"image.variant=iptables,image.digest=sha256:" + strings.Repeat("0", 64), "NOTE: image.digest has to be that of the iptables variant."},
		{"prometheus.rules.enabled=true", "NOTE: prometheus.rules and prometheus.dashboard show nothing"},
	} {
		text := notes(t, "--set", c.set)
		if !strings.Contains(text, c.want) || strings.Count(text, "NOTE: ") != 1 {
			t.Errorf("%s: no note of its own %q in\n%s", c.set, c.want, text)
		}
	}
	if text := notes(t); strings.Contains(text, "NOTE: ") {
		t.Errorf("a note about the defaults:\n%s", text)
	}
}

// What can't work is refused before anything is installed, and named.
func TestRefusedValues(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ values, want string }{
		{"masquerade: true", "additional properties 'masquerade' not allowed"},
		{"ipMasqAgent: {config: {nonMasqueradeCidrs: []}}", "'/ipMasqAgent/config': additional properties 'nonMasqueradeCidrs' not allowed"},
		{"ipMasqAgent: {config: {nonMasqueradeCIDRs: [10.0.0/8]}}", "'/ipMasqAgent/config/nonMasqueradeCIDRs/0': '10.0.0/8' does not match"},
		{"ipMasqAgent: {config: {nonMasqueradeCIDRs: [10.0.0.0]}}", "'/ipMasqAgent/config/nonMasqueradeCIDRs/0': '10.0.0.0' does not match"},
		{"ipMasqAgent: {config: {nonMasqueradeCIDRs: [null]}}", "'/ipMasqAgent/config/nonMasqueradeCIDRs/0': got null, want string"},
		{"ipMasqAgent: {config: {masqLinkLocal: 'yes'}}", "'/ipMasqAgent/config/masqLinkLocal': got string, want boolean"},
		{"ipMasqAgent: {fragments: [a, a]}", "'/ipMasqAgent/fragments': items at 0 and 1 are equal"},
		{"ipMasqAgent: {fragments: [ip-masq-agent]}", "ipMasqAgent.fragments: ip-masq-agent is read already"},
		{"ipMasqAgent: {fragments: [a, {name: a, key: b}]}", "ipMasqAgent.fragments: a is read already"},
		{"ipMasqAgent: {fragments: [{name: a}]}", "'/ipMasqAgent/fragments/0': missing property 'key'"},
		{"ipMasqAgent: {existingConfigMap: a, config: {masqLinkLocal: true}}", "config makes a ConfigMap and existingConfigMap adopts one"},
		{"ipMasqAgent: {existingConfigMap: A_B}", "'/ipMasqAgent/existingConfigMap': 'A_B' does not match"},
		{"enableIPv4Masquerade: 'true'", "'/enableIPv4Masquerade': got string, want null or boolean"},
		{"ipv4NativeRoutingCIDR: 'fd00::/8'", "'/ipv4NativeRoutingCIDR': 'fd00::/8' does not match"},
		{"ipv4NativeRoutingCIDR: 10.0.0.300/8", "'/ipv4NativeRoutingCIDR': '10.0.0.300/8' does not match"},
		{"ipv6NativeRoutingCIDR: [10.0.0.0/8]", "'/ipv6NativeRoutingCIDR/0': '10.0.0.0/8' does not match"},
		{"bpf: {natMax: -1}", "'/bpf/natMax': minimum: got -1, want 0"},
		{"bpf: {masquerade: null}", "'/bpf': missing property 'masquerade'"},
		{"devices: [eth/0]", "'/devices/0': 'eth/0' does not match"},
		{"devices: [eth0], ", "did not find expected"},
		{"{devices: [eth0], egressMasqueradeInterfaces: [eth1]}", "devices and egressMasqueradeInterfaces: in eBPF mode both mean the same, but differ"},
		{"remoteNodeMasquerade: internal", "'/remoteNodeMasquerade': value must be one of '', 'none', 'external', 'all'"},
		{"{remoteNodeMasquerade: all, enableRemoteNodeMasquerade: false}", "remoteNodeMasquerade and enableRemoteNodeMasquerade say the same"},
		{"unknownProtocols: allow", "'/unknownProtocols': value must be one of '', 'masquerade', 'drop', 'pass'"},
		{"snatPortRange: 1024..65535", "'/snatPortRange': '1024..65535' does not match"},
		{"drainTimeout: 90", "'/drainTimeout': got number, want string"},
		{"drainTimeout: '90'", "'/drainTimeout': '90' does not match"},
		{"extraConfig: {max-ports-per-pods: 1}", "'/extraConfig': additional properties 'max-ports-per-pods' not allowed"},
		{"extraConfig: {log-level: debug}", "'/extraConfig': additional properties 'log-level' not allowed"},
		{"extraConfig: {max-ports-per-pod: {a: 1}}", "'/extraConfig/max-ports-per-pod': got object, want "},
		{"existingConfigDirConfigMap: bauta-config", "existingConfigDirConfigMap: bauta-config is the one that this chart makes"},
		{"image: {digest: latest}", "'/image/digest': 'latest' does not match"},
		{"image: {tag: 'a b'}", "'/image/tag': 'a b' does not match"},
		{"image: {pullPolicy: Sometimes}", "'/image/pullPolicy': value must be one of 'Always', 'IfNotPresent', 'Never'"},
		{"{bpf: {masquerade: false}, image: {variant: ebpf}}", "image.variant: ebpf has no iptables"},
		{"updateStrategy: {rollingUpdate: {maxSurge: 1}}", "'/updateStrategy/rollingUpdate/maxSurge': value must be one of 0, '0', '0%'"},
		{"extraCapabilities: [CAP_SYS_ADMIN]", "'/extraCapabilities/0': 'not' failed"},
		{"podLabels: {app.kubernetes.io/name: mine}", "'/podLabels/app.kubernetes.io~1name': false schema"},
		{"startupTaint: {key: 'a b'}", "'/startupTaint/key': 'a b' does not match"},
		{"prometheus: {port: 0}", "'/prometheus/port': minimum: got 0, want 1"},
		{"prometheus: {podMonitor: {enabled: true}}", "nothing to scrape unless prometheus.enabled is true"},
		{"prometheus: {enabled: true, podMonitor: {enabled: true}, serviceMonitor: {enabled: true}}", "scrape everything twice"},
		{"bpf: null", "missing property 'bpf'"},
		{"image: {tag: null}", "'/image': missing property 'tag'"},
		{"prometheus: {rules: null}", "'/prometheus': missing property 'rules'"},
		{"logLevel: trace", "'/logLevel': value must be one of '', 'debug', 'info', 'warn', 'error'"},
	} {
		_, stderr, ok := tool(t, "helm", []byte(c.values), "template", "bauta", chartDir, "--values", "-")
		if ok || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: accepted %v, want %q in\n%s", c.values, ok, c.want, stderr)
		}
	}
	// A Kubernetes that has no appArmorProfile.
	helm(t, "template", "bauta", chartDir, "--kube-version", oldestKube)
	_, stderr, ok := tool(t, "helm", nil, "template", "bauta", chartDir, "--kube-version", "1.29.9")
	if ok || !strings.Contains(stderr, "chart requires kubeVersion: >=1.30.0-0") {
		t.Errorf("Kubernetes 1.29: %v %s", ok, stderr)
	}
}

// Options are read at the start, so other ones roll the pods. The list of ip-masq-agent is
// watched, so another one does not.
func TestWhatRollsThePods(t *testing.T) {
	t.Parallel()
	pods := func(args ...string) string {
		t.Helper()
		out, err := yaml.Marshal(objects(t, template(t, "ipmasq", args...))["DaemonSet bauta"].get("spec", "template"))
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	before := pods()
	for _, value := range []string{"ipMasqAgent.config.nonMasqueradeCIDRs={10.0.0.0/8}", "ipMasqAgent.config.masqLinkLocal=false",
		"updateStrategy.rollingUpdate.maxUnavailable=1", "prometheus.rules.enabled=true"} {
		if pods("--set", value) != before {
			t.Errorf("%s rolls the pods", value)
		}
	}
	for _, value := range []string{"devices=eth0", "bpf.masquerade=false", "extraConfig.leak-sentinel=true", "existingConfigDirConfigMap=x", "logLevel=debug"} {
		if pods("--set", value) == before {
			t.Errorf("%s does not roll the pods", value)
		}
	}
}

// One agent a node: a second release is refused, because the names are the same.
func TestNamesAreFixed(t *testing.T) {
	t.Parallel()
	names := func(release string) (keys []string) {
		t.Helper()
		for key := range objects(t, helm(t, "template", release, chartDir, "--namespace", namespace, "--values", valuesFile("everything"))) {
			keys = append(keys, key)
		}
		slices.Sort(keys)
		return keys
	}
	if a, b := names("bauta"), names("another"); !slices.Equal(a, b) {
		t.Errorf("%q\n%q", a, b)
	}
}
