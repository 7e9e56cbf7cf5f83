package chart_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"bauta.dev/bauta/internal/agent"
)

// hostPaths are what a pod has of the node, as PATH TYPE.
func (p pod) hostPaths() (paths []string) {
	for _, v := range p.Volumes {
		if v.HostPath != nil {
			paths = append(paths, v.HostPath.Path+" "+v.HostPath.Type)
		}
	}
	return paths
}

// What the agent may do on the node, and no more.
func TestPrivileges(t *testing.T) {
	t.Parallel()
	ebpf := []string{"BPF", "NET_ADMIN", "PERFMON"}
	iptables := append(slices.Clone(ebpf), "NET_RAW")
	paths := []string{"/sys/fs/bpf Directory", "/run/bauta DirectoryOrCreate"}
	lock := append(slices.Clone(paths), "/run/xtables.lock FileOrCreate")
	for _, c := range []struct {
		set, name           string
		capabilities, paths []string
		image               string
	}{
		{"defaults", "bauta", ebpf, paths, "bauta.dev/bauta:dev"},
		{"ipmasq", "bauta", ebpf, paths, "bauta.dev/bauta:dev"},
		{"adopted", "bauta", ebpf, paths, "bauta.dev/bauta:dev"},
		{"iptables", "bauta", iptables, lock, "bauta.dev/bauta:dev-iptables"},
		{"everything", "bauta", append(slices.Clone(ebpf), "SYS_RESOURCE", "SYS_PTRACE"), paths,
			"registry.example/mirror/bauta:v1.2.3@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
		{"cleanup", "bauta-cleanup", iptables, lock, "bauta.dev/bauta:dev-iptables"},
	} {
		p := podOf(t, objects(t, template(t, c.set)), c.name)
		if diff := cmp.Diff(c.paths, p.hostPaths()); diff != "" {
			t.Errorf("%s: host paths (-want +got):\n%s", c.set, diff)
		}
		if !p.HostNetwork || p.HostPID || p.DNSPolicy != "Default" || p.PriorityClassName != "system-node-critical" {
			t.Errorf("%s: host network %v, PID %v, DNS %s, priority %s", c.set, p.HostNetwork, p.HostPID, p.DNSPolicy, p.PriorityClassName)
		}
		if s := p.SecurityContext; s.SeccompProfile.Type != "RuntimeDefault" || s.AppArmorProfile.Type != "Unconfined" {
			t.Errorf("%s: %+v", c.set, s)
		}
		for _, ctr := range append(p.InitContainers, p.Containers...) {
			s := ctr.SecurityContext
			if diff := cmp.Diff(c.capabilities, s.Capabilities.Add); diff != "" || !slices.Equal(s.Capabilities.Drop, []string{"ALL"}) {
				t.Errorf("%s: drop %q, add (-want +got):\n%s", c.set, s.Capabilities.Drop, diff)
			}
			if s.RunAsUser != 0 || s.Privileged == nil || *s.Privileged || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
				s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
				t.Errorf("%s: %+v", c.set, s)
			}
			if ctr.Image != c.image {
				t.Errorf("%s: image %s, want %s", c.set, ctr.Image, c.image)
			}
		}
	}
}

// The variant with iptables is for what needs iptables, or when it is asked for.
func TestImageVariant(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ set, want string }{
		{"bpf.masquerade=false", "bauta.dev/bauta:dev-iptables"},
		{"takeOver=IP-MASQ-AGENT", "bauta.dev/bauta:dev-iptables"},
		{"image.variant=iptables,image.tag=v1", "bauta.dev/bauta:v1-iptables"},
		{"image.variant=ebpf", "bauta.dev/bauta:dev"},
		{"cleanup.enabled=true,image.variant=ebpf", "bauta.dev/bauta:dev"},
	} {
		name := "bauta"
		if strings.Contains(c.set, "cleanup") {
			name = "bauta-cleanup"
		}
		p := podOf(t, objects(t, template(t, "defaults", "--set", c.set)), name)
		if got := p.Containers[0].Image; got != c.want {
			t.Errorf("%s: %s, want %s", c.set, got, c.want)
		}
		if hasLock := slices.Contains(p.hostPaths(), "/run/xtables.lock FileOrCreate"); hasLock != strings.HasSuffix(c.want, "-iptables") {
			t.Errorf("%s: lock %v", c.set, hasLock)
		}
	}
}

// Mounts and volumes belong together, and what comes from a ConfigMap is a directory: the
// kubelet does not update a subPath.
func TestMounts(t *testing.T) {
	t.Parallel()
	for _, set := range sets {
		name := "bauta"
		if set == "cleanup" {
			name = "bauta-cleanup"
		}
		p := podOf(t, objects(t, template(t, set)), name)
		for _, ctr := range append(p.InitContainers, p.Containers...) {
			used := make(map[string]string)
			for _, m := range ctr.VolumeMounts {
				i := slices.IndexFunc(p.Volumes, func(v volume) bool { return v.Name == m.Name })
				if i < 0 || m.SubPath != "" || m.ReadOnly == (p.Volumes[i].HostPath != nil) {
					t.Errorf("%s: mount %+v", set, m)
				}
				used[m.Name] = m.MountPath
			}
			for _, v := range p.Volumes {
				if used[v.Name] == "" || v.HostPath != nil && v.HostPath.Path != used[v.Name] {
					t.Errorf("%s, container %s: volume %s at %q", set, ctr.Name, v.Name, used[v.Name])
				}
			}
			if used["bpffs"] != filepath.Dir(agent.DefaultBPFRoot) || used["run"] != agent.DefaultRunDir {
				t.Errorf("%s: the agent's places are on no mount: %q", set, used)
			}
			for _, m := range ctr.VolumeMounts {
				if want := map[string]string{"bpffs": "HostToContainer"}[m.Name]; m.MountPropagation != want {
					t.Errorf("%s: %s: propagation %q, want %q", set, m.Name, m.MountPropagation, want)
				}
			}
		}
	}
}

// Each ConfigMap may be missing, and becomes a file of its own name: the agent shows it as
// where a prefix is from.
func TestListsAreFragments(t *testing.T) {
	t.Parallel()
	for set, want := range map[string][]string{
		"ipmasq":  {"ip-masq-agent config"},
		"adopted": {"my-ip-masq-agent config", "cloud-ip-masq-agent config", "mesh ranges.yaml"},
	} {
		all := objects(t, template(t, set))
		var got []string
		for _, v := range podOf(t, all, "bauta").Volumes {
			if v.Name != "ip-masq-agent" {
				continue
			}
			for _, s := range v.Projected.Sources {
				m := s.ConfigMap
				if !m.Optional || len(m.Items) != 1 || m.Items[0].Path != m.Name {
					t.Errorf("%s: %+v", set, m)
				}
				got = append(got, m.Name+" "+m.Items[0].Key)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", set, diff)
		}
		if made := all["ConfigMap ip-masq-agent"] != nil; made != (set == "ipmasq") {
			t.Errorf("%s: ConfigMap made: %v", set, made)
		}
	}
}

// The kubelet asks where the agent listens, and only /readyz may depend on the API server.
func TestProbes(t *testing.T) {
	t.Parallel()
	for _, set := range []string{"defaults", "everything", "podmonitor"} {
		ctr := podOf(t, objects(t, template(t, set)), "bauta").Containers[0]
		listen := strings.TrimPrefix(ctr.Args[slices.IndexFunc(ctr.Args, func(a string) bool { return strings.HasPrefix(a, "--prometheus-serve-addr=") })], "--prometheus-serve-addr=")
		host, port, _ := strings.Cut(listen, ":")
		for path, p := range map[string][]*probe{"/healthz": {ctr.StartupProbe, ctr.LivenessProbe}, "/readyz": {ctr.ReadinessProbe}} {
			for _, p := range p {
				if p == nil || p.HTTPGet.Path != path || p.HTTPGet.Host != "127.0.0.1" || fmt.Sprint(p.HTTPGet.Port) != port {
					t.Errorf("%s: %s is asked with %+v, the agent listens on %s", set, path, p, listen)
				}
			}
		}
		// Nobody but the kubelet is answered unless metrics were asked for.
		if open := host == ""; open != (set != "defaults") || open != (len(ctr.Ports) == 1) {
			t.Errorf("%s: listens on %s, ports %+v", set, listen, ctr.Ports)
		}
	}
}

// rule is what a role allows.
type rule struct{ APIGroups, Resources, Verbs, ResourceNames []string }

// What the agent may ask the API server for, and no more.
func TestPermissions(t *testing.T) {
	t.Parallel()
	nodes := rule{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get", "list", "watch"}}
	patch := rule{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"patch"}}
	events := rule{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}}
	for set, want := range map[string][]rule{
		"startupTaint.enabled=false": {nodes}, "startupTaint.enabled=true": {nodes, patch}, "startupTaint.enabled=true,startupTaint.admissionPolicy=false": {nodes, patch},
	} {
		all := objects(t, template(t, "defaults", "--set", set))
		if diff := cmp.Diff(want, into[[]rule](t, all["ClusterRole bauta"]["rules"])); diff != "" {
			t.Errorf("%s: ClusterRole (-want +got):\n%s", set, diff)
		}
		if diff := cmp.Diff([]rule{events}, into[[]rule](t, all["Role bauta-events"]["rules"])); diff != "" {
			t.Errorf("%s: Role (-want +got):\n%s", set, diff)
		}
		kinds := make(map[string]bool)
		for key := range all {
			kind, _, _ := strings.Cut(key, " ")
			kinds[kind] = true
			if !slices.Contains([]string{"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ConfigMap", "DaemonSet",
				"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}, kind) {
				t.Errorf("%s: %s", set, key)
			}
		}
		// Whoever may patch nodes is held to one taint of its own node, unless that was not wanted.
		if held := kinds["ValidatingAdmissionPolicy"] && kinds["ValidatingAdmissionPolicyBinding"]; held != (set == "startupTaint.enabled=true") {
			t.Errorf("%s: admission policy: %v", set, held)
		}
	}
	// The clean-up needs nothing of the API server.
	all := objects(t, template(t, "cleanup"))
	if p := podOf(t, all, "bauta-cleanup"); len(all) != 1 || p.AutomountServiceAccountToken || p.ServiceAccountName != "" {
		t.Errorf("the clean-up has %d objects, token %v", len(all), p.AutomountServiceAccountToken)
	}
}
