package e2e_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/nodes/nodestest"
)

// clusterNodes is the largest cluster that Kubernetes is said to bear, three times.
const clusterNodes = 15_000

// BenchmarkClusterOfNodes is what a large cluster costs the agent of one node: until it is known
// and in force, at rest, while kubelets report, and while nodes come and go. One go is one of each.
//
//	go test ./test/e2e -run '^$' -bench ClusterOfNodes -benchtime 1x
func BenchmarkClusterOfNodes(b *testing.B) {
	size, minute := clusterNodes, time.Minute
	if text := os.Getenv("BAUTA_CLUSTER"); text != "" { // a smaller one, and a shorter minute
		_, err := fmt.Sscanf(text, "%d %s", &size, &text)
		must(b, err)
		minute, err = time.ParseDuration(text)
		must(b, err)
	}
	for b.Loop() {
		n := newNode(b, lab.Options{})
		api := nodestest.New()
		var list []*corev1.Node
		for i := range size {
			list = append(list, nodestest.Large(i))
		}
		list[0] = nodestest.Node("node-00000", lab.PodRange4.String()+","+lab.PodRange6.String(), "InternalIP="+n.NodeAddr.V4.String())
		api.Put(list...)
		kubeconfig := serveAPI(n, api).kubeconfig
		start := time.Now()
		n.launch("--enable-k8s", "--k8s-kubeconfig-path="+kubeconfig, "--k8s-node-name=node-00000")
		m := &meter{b: b, n: n, api: api}
		synced := time.Duration(0)
		for st, err := n.readStatus(); err != nil || !st.Agent.Ready; st, err = n.readStatus() {
			if err == nil && synced == 0 && st.Kubernetes != nil && st.Kubernetes.Synced {
				synced = time.Since(start)
			}
			time.Sleep(20 * time.Millisecond)
		}
		b.Logf("synced after %s, in force after %s; list of %d nodes: %.1f MB", synced.Round(10*time.Millisecond), time.Since(start).Round(10*time.Millisecond), size, float64(api.Bytes())/1e6)
		m.report("start", 0)
		if st := n.status(); st.Nodes.Addresses < 2*size-2 {
			b.Fatalf("%+v", st.Nodes)
		}
		m.rest("at rest", minute, func(int) {})
		m.rest("100 heartbeats/s", minute, func(i int) { api.Put(nodestest.Beat(list[1+i%(size-1)], time.Now())) })
		m.rest("100 changes/s", minute, func(i int) {
			k := 1 + i%(size-1)
			if name := list[k].Name; i%2 == 0 {
				api.Delete(name)
			} else {
				api.Put(nodestest.Node(fmt.Sprintf("new-%d", i), fmt.Sprintf("100.0.%d.0/24", i&255), fmt.Sprintf("InternalIP=10.99.%d.%d", i>>8&255, i&255)))
			}
		})
		labtest.Eventually(b, time.Minute, func() error {
			if st, err := n.readStatus(); err != nil || time.Since(st.Agent.LastApply) < 3*time.Second {
				return fmt.Errorf("not at rest: %v", err)
			}
			return nil
		})
		changed := time.Now()
		api.Put(nodestest.Node("last", "", "InternalIP=10.98.0.1"))
		labtest.Eventually(b, 10*time.Second, func() error {
			if st, err := n.readStatus(); err != nil || !st.Agent.LastApply.After(changed) {
				return fmt.Errorf("not applied yet: %v", err)
			}
			return nil
		})
		st := n.status()
		b.Logf("one more change: in the kernel after %s", st.Agent.LastApply.Sub(changed).Round(time.Millisecond))
		n.stop()
	}
}

// meter reads what the agent has used.
type meter struct {
	b     *testing.B
	n     *node
	api   *nodestest.Server
	cpu   float64
	bytes int64
}

// rest lets time pass, with something done a hundred times a second.
func (m *meter) rest(what string, d time.Duration, do func(i int)) {
	m.cpu, m.bytes = m.cpuSeconds(), m.api.Bytes()
	end, tick := time.Now().Add(d), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	i := 0
	for time.Now().Before(end) {
		<-tick.C
		do(i)
		i++
	}
	m.report(fmt.Sprintf("%s (%d)", what, i), d)
}

func (m *meter) report(what string, d time.Duration) {
	m.b.Helper()
	m.b.Logf("%s: CPU %.2f s, RSS %s, peak %s, API %.2f MB in %s", what, m.cpuSeconds()-m.cpu,
		m.proc("VmRSS"), m.proc("VmHWM"), float64(m.api.Bytes()-m.bytes)/1e6, d)
}

func (m *meter) proc(key string) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.n.agent.cmd.Process.Pid))
	must(m.b, err)
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return "?"
}

func (m *meter) cpuSeconds() float64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.n.agent.cmd.Process.Pid))
	must(m.b, err)
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+2:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return float64(user+system) / 100 // USER_HZ
}
