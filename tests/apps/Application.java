import java.io.File;
import java.nio.charset.StandardCharsets;
import java.util.Base64;
import org.apache.hadoop.yarn.api.records.FinalApplicationStatus;
import org.apache.hadoop.yarn.client.api.AMRMClient;
import org.apache.hadoop.yarn.conf.YarnConfiguration;
import org.apache.hadoop.yarn.exceptions.YarnRuntimeException;

/**
 * A YARN application without Spark: its master registers, sleeps, and ends as it is told. It starts in two seconds.
 *
 * No JDK is needed: Spark brings the Janino compiler, whose main class org.codehaus.janino.SimpleCompiler
 * compiles and runs a source file. Arguments: seconds to sleep; the final status, or an exit code with which it ends
 * without a word to the manager; the diagnostics (base64, as they may have several lines); the tracking URL; a file
 * that it waits for.
 */
public class Application {
    private static final long HEARTBEAT = 500;

    public static void main(String[] arguments) throws Exception {
        String end = arguments[1];
        String diagnostics = new String(Base64.getDecoder().decode(arguments[2]), StandardCharsets.UTF_8);
        String url = arguments[3];
        File awaited = new File(arguments[4]);
        AMRMClient client = AMRMClient.createAMRMClient();
        client.init(new YarnConfiguration());
        client.start();
        client.registerApplicationMaster("localhost", -1, url);
        System.out.println("sleeping " + arguments[0] + " s");
        long until = System.currentTimeMillis() + (long) (1000 * Double.parseDouble(arguments[0]));
        heartbeat(client);
        while (System.currentTimeMillis() < until || !awaited.exists()) {
            long left = until - System.currentTimeMillis();
            Thread.sleep(left > 0 ? Math.min(HEARTBEAT, left) : 100);
            heartbeat(client);
        }
        System.err.println("ending with " + end);
        if (Character.isDigit(end.charAt(0))) {
            Runtime.getRuntime().halt(Integer.parseInt(end));
        }
        client.unregisterApplicationMaster(FinalApplicationStatus.valueOf(end), diagnostics, url);
        Runtime.getRuntime().halt(0);
    }

    /**
     * A ResourceManager that becomes a standby may fail a call in the middle; the next one goes to its successor.
     * It interrupts its dispatcher, and what was to be handed to that ends as a YarnRuntimeException.
     * One clause for both is more than Janino compiles.
     */
    private static void heartbeat(AMRMClient client) throws Exception {
        try {
            client.allocate(0.5f);
        } catch (java.io.IOException error) {
            System.err.println("no answer to a heartbeat: " + error);
        } catch (YarnRuntimeException error) {
            System.err.println("no answer to a heartbeat: " + error);
        }
    }
}
