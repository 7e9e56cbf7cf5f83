package e2e_test

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/nodes/nodestest"
)

// apiServer is an API server on the node of a lab, which comes and goes.
type apiServer struct {
	*nodestest.Server
	n          *node
	address    string
	kubeconfig string
	stop       func()
}

func serveAPI(n *node, api *nodestest.Server) *apiServer {
	n.t.Helper()
	s := &apiServer{Server: api, n: n, address: "127.0.0.1:0"}
	s.start()
	n.t.Cleanup(func() { s.stop() })
	s.kubeconfig = n.write("kubeconfig", nodestest.Kubeconfig("http://"+s.address, "secret"))
	return s
}

func (s *apiServer) start() {
	s.n.t.Helper()
	var l net.Listener
	must(s.n.t, s.n.Node.Do(func() (err error) {
		l, err = net.Listen("tcp", s.address)
		return err
	}))
	s.address = l.Addr().String()
	server := &http.Server{Handler: s.Server}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(l)
	}()
	s.stop = func() {
		server.Close()
		<-done
	}
}

// awaitNodeList waits for the addresses of other nodes in the kernel.
func (n *node) awaitNodeList(limit time.Duration, want string) {
	n.t.Helper()
	labtest.Eventually(n.t, limit, func() error {
		var addrs []string
		for line := range strings.Lines(n.cli("bpf", "node", "list")) {
			addrs = append(addrs, strings.Fields(line)[0])
		}
		if got := strings.Join(addrs[min(1, len(addrs)):], " "); got != want { // the first line is a header
			return fmt.Errorf("bpf node list: %s, want %s", got, want)
		}
		return nil
	})
}

// Packets to other nodes and their pods keep their source as nodes come, change and go, through
// the absence of the API server and a crash meanwhile.
func TestKubernetesNodes(t *testing.T) {
	t.Parallel()
	const other, otherPod, third = "198.51.100.7", "198.51.100.33", "198.51.100.8"
	n := newNode(t, lab.Options{})
	api := serveAPI(n, nodestest.New())
	own := nodestest.Node("self", lab.PodRange4.String()+","+lab.PodRange6.String(), "InternalIP="+n.NodeAddr.V4.String(), "Hostname=self")
	api.Put(own)
	args := []string{"--enable-k8s", "--k8s-kubeconfig-path=" + api.kubeconfig, "--k8s-node-name=self"}
	n.start(args...)
	w := n.tapWorld()
	want := func(when string, src map[string]netip.Addr) {
		t.Helper()
		for dst, src := range src {
			t.Log(when, dst)
			w.want(netip.MustParseAddr(dst), src)
		}
	}
	pod, masqueraded := n.PodAddrs[0].V4, n.NodeAddr.V4
	want("alone", map[string]netip.Addr{other: masqueraded, otherPod: masqueraded})

	api.Put(nodestest.Node("other", "198.51.100.32/28", "InternalIP="+other))
	n.awaitNodeList(2*time.Second, other)
	want("with another", map[string]netip.Addr{other: pod, otherPod: pod, third: masqueraded, "198.51.100.50": masqueraded})

	api.stop()
	n.await("the API server is away", func(st agent.Status) bool { return st.Kubernetes != nil && st.Kubernetes.Error != "" })
	want("API server away", map[string]netip.Addr{other: pod, otherPod: pod, third: masqueraded})
	n.kill()
	want("agent killed", map[string]netip.Addr{other: pod, otherPod: pod, third: masqueraded})
	n.start(args...)
	want("started without the API server", map[string]netip.Addr{other: pod, otherPod: pod, third: masqueraded})
	if st := n.status(); st.Kubernetes.Synced || len(st.Degraded()) > 0 {
		t.Errorf("restored: %+v, degraded: %v", st.Kubernetes, st.Degraded())
	}

	api.Restore(7, own, nodestest.Node("other", "", "InternalIP="+third))
	api.start()
	n.awaitNodeList(40*time.Second, third)
	want("another state", map[string]netip.Addr{other: masqueraded, otherPod: masqueraded, third: pod})
	text := n.cli("status")
	if !strings.Contains(text, "node self") || !strings.Contains(text, "synced, 2 nodes") {
		t.Errorf("status:\n%s", text)
	}
}
