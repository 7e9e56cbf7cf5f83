package cluster

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
)

// CNI is how pods are connected to their node.
type CNI string

// The plugins that the nodes can use.
const (
	PTP    CNI = "ptp"    // a routed veth pair for each pod
	Bridge CNI = "bridge" // one bridge for all pods
)

// containerdConfig: no privilege of the machine is asked for that a container like
// this one may lack (lowering oom_score_adj needs CAP_SYS_RESOURCE).
const containerdConfig = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = %q
`

// kubeletConfig: as on a real node but for the missing certificates, cgroup version 1,
// and measuring of disks, which are the machine's.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
volumePluginDir: /var/lib/kubelet/volumeplugins
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
resolvConf: ""
evictionHard: {}
imageGCHighThresholdPercent: 100
localStorageCapacityIsolation: false
# The kubelet's own default is 1m: how long a changed ConfigMap may take.
syncFrequency: 1s
nodeStatusUpdateFrequency: 3s
`

// writeConfig writes the files of a node's components.
func (s *nodeSpec) writeConfig() error {
	made := []string{s.temp(), s.cniDir()}
	for _, dir := range stateDirs {
		made = append(made, s.state(dir))
	}
	for _, dir := range made {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	spec, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	for name, text := range map[string]string{
		"node.json":       string(spec),
		"containerd.toml": fmt.Sprintf(containerdConfig, PauseImage, s.cniDir()),
		"kubelet.yaml":    kubeletConfig,
	} {
		if err := os.WriteFile(filepath.Join(s.Dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (s *nodeSpec) cniDir() string { return filepath.Join(s.Dir, "cni") }

// writeCNI writes the network configuration of a node's pods. With masquerade the
// plugins translate by themselves, which is what Bauta has to notice.
func (s *nodeSpec) writeCNI(kind CNI, pods []netip.Prefix, masquerade bool) error {
	type object = map[string]any
	var ranges [][]object
	var routes []object
	for _, p := range pods {
		ranges = append(ranges, []object{{"subnet": p}})
		dst := "0.0.0.0/0"
		if p.Addr().Is6() {
			dst = "::/0"
		}
		routes = append(routes, object{"dst": dst})
	}
	plugin := object{
		"type": kind, "mtu": 1500, "ipMasq": masquerade,
		"ipam": object{"type": "host-local", "ranges": ranges, "routes": routes},
	}
	if kind == Bridge {
		plugin["bridge"], plugin["isGateway"], plugin["hairpinMode"] = "cni0", true, true
	}
	text, err := json.MarshalIndent(object{
		"cniVersion": "0.4.0", "name": "test",
		"plugins": []object{plugin, {"type": "portmap", "capabilities": object{"portMappings": true}}},
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.cniDir(), "10-test.conflist"), text, 0o644)
}
